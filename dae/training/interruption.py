"""Stopping a run by a signal, to this process or to another worker."""

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dae.errors import Interrupted
from dae.replicas import ALONE, Replicas

# Schedulers such as SLURM can send SIGUSR1 before they end a job; a terminal that is closed sends SIGHUP.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interruption(contextlib.AbstractContextManager):
    """Takes note of the STOPPING signals while it is entered, until the training loop asks for them.

    A second SIGINT raises KeyboardInterrupt at once. A signal that the process ignores, such as SIGHUP under nohup,
    stays ignored, except SIGINT, which shells ignore for commands in the background. In a thread other than the main
    one, where Python allows no handlers, the signals of other workers count only.
    """

    def __init__(self, replicas: Replicas = ALONE, run_dir: Path | None = None) -> None:
        """Prepare for the run in `run_dir`, which the message of an interruption names."""
        self._replicas, self._run_dir = replicas, run_dir
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: Any) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received.append(number)

    def raise_if_pending(self, when: str, save: Callable[[], object] = lambda: None) -> None:
        """Call `save` and raise Interrupted, on all workers, if any of them has received a signal.

        All workers must call this at the same point. `when` completes the message "stopped and saved after ...".
        """
        statuses = self._replicas.exchange(b"".join(str(number).encode() for number in self._received[:1]))
        if any(statuses):
            save()
            self._replicas.exchange(b"")  # wait until the chief has saved, because workers fail with one that ends
            number = int(next(filter(None, statuses)))
            raise Interrupted(number, f"stopped and saved after {when}", self._run_dir)
