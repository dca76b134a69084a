"""Time spent on the current epoch."""

import time

import tensorflow as tf


class Stopwatch:
    """Accumulates seconds in a variable, which a checkpoint saves, so that they add up over processes."""

    def __init__(self, seconds: tf.Variable) -> None:
        """Start the watch."""
        self._seconds, self._last = seconds, time.monotonic()

    def update(self) -> float:
        """Add the time since the last update and return the total."""
        now = time.monotonic()
        self._seconds.assign_add(now - self._last)
        self._last = now
        return float(self._seconds)
