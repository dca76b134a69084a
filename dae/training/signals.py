"""Signals to stop, deferred until the training loop can save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Schedulers such as SLURM can send SIGUSR1 before they end a job.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Yield the list of STOPPING signals received so far; a second SIGINT raises KeyboardInterrupt at once."""
    pending: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        pending.append(number)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield pending
        return
    previous = {number: signal.signal(number, receive) for number in STOPPING}
    try:
        yield pending
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
