"""SIGINT and SIGTERM, kept until the loop is ready for them."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop can stop at a good moment; a second SIGINT stops at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return
    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
