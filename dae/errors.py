"""What can go wrong, by whose fault it is; the command line turns each into its exit status."""

import difflib
import re
import signal
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """A mistake of the user's: one line naming the flag or file, the bad value and what is allowed."""


class RunError(Exception):
    """A failure of the run itself, such as a loss that is no longer finite."""


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved its state."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal.Signals(signal_number)


# What TensorFlow says before it comes to the matter.
_PREAMBLE = re.compile(r"\s*$|Graph execution error:|Detected at node |<stack traces unavailable>|  File |    ")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if not _PREAMBLE.match(line)), type(error).__name__)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name most like `name`, or nothing where none is."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def choose(table: Mapping[str, T], name: str, flag: str, *others: str) -> T:
    """The entry of `table` called `name`; raises UsageError naming `flag` where there is none.

    `others` says in words what may be named beside the entries.
    """
    if name not in table:
        known = ", ".join([*table, *others])
        raise UsageError(f"{flag}: unknown name {name!r}{nearest(name, table)} (known: {known})")
    return table[name]
