"""Exceptions for user errors, failed runs and interruption, which `dae.cli` maps to exit statuses; and warnings."""

import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class UsageError(Exception):
    """A user's mistake, in one line: the flag or file, what is wrong with it, and what is allowed."""


def _resume_hint(run_dir: Path | None) -> str:
    return "" if run_dir is None else f"; continue with dae.train(config, {str(run_dir)!r}, resume=True)"


class RunError(Exception):
    """A failure of the run itself, such as a loss that is not finite. `run_dir` is its folder if it can be resumed."""

    def __init__(self, message: str, run_dir: Path | None = None) -> None:
        super().__init__(message + _resume_hint(run_dir))
        self.message, self.run_dir = message, run_dir


class Diverged(RunError):
    """The loss or its gradient is not finite."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state has been saved. `run_dir` is the run's folder, if it is known.

    Like any KeyboardInterrupt, it is not caught by `except Exception`, and ends the execution of a notebook.
    """

    def __init__(self, signal_number: int, message: str, run_dir: Path | None = None) -> None:
        super().__init__(message + _resume_hint(run_dir))
        self.signal_number, self.message, self.run_dir = signal.Signals(signal_number), message, run_dir


# The arguments of `named_warnings` while its block is executed.
_NAMED: list[tuple[str, list[str]]] = []


def warn(message: str) -> None:
    """Print a warning on stderr, above a progress bar if there is one."""
    for name, known in _NAMED:
        if message in known:
            return
        known.append(message)
        message = f"{name}: {message}"
    tqdm.write(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def named_warnings(name: str, known: list[str]) -> Iterator[None]:
    """Put `name` before each warning of the block. Print none that is in `known`, to which new ones are added."""
    _NAMED.append((name, known))
    try:
        yield
    finally:
        _NAMED.pop()


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Drop what is written to the file descriptor of stderr, also by libraries."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as devnull, open(os.dup(2), "wb") as stderr:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)


# Lines that TensorFlow prints before the reason of an error in a graph.
_PREAMBLE = re.compile(r"\s*$|Graph execution error:|Detected at node |<stack traces unavailable>|  File |    ")
# Keras's text on an object that it cannot load, before the reason.
_KERAS_PREAMBLE = re.compile(
    r"Exception encountered: |Example error message for object <.*?>:|Exception encountered when calling .*\n"
)
# Codes with which Keras colours its messages.
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


# The operation and the device that it names before and after that reason.
_OPERATION = re.compile(r"^\{\{function_node [^}]*\}\} | \[Op:\w+\].*$")


def first_line(error: BaseException) -> str:
    """Return the first informative line of an exception's message, or its type if it has no message.

    It is cut off after 200 characters.
    """
    message = _KERAS_PREAMBLE.split(_COLOUR.sub("", str(error)))[-1]
    line = next((line for line in message.splitlines() if not _PREAMBLE.match(line)), type(error).__name__)
    line = _OPERATION.sub("", line).strip()
    return line if len(line) <= 200 else f"{line[:200]}..."


def shown(value: object) -> str:
    """Return the representation of a user's value for an error message: one line of at most about 200 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of thousands of digits, or an object of the user's
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def listed(values: Iterable[object]) -> str:
    """Return the first five values, separated by commas, for a message; dots stand for others."""
    names = [str(value) for value in values]
    return ", ".join(names[:5] + ["..."] * (len(names) > 5))


@contextlib.contextmanager
def as_usage_error(source: str | Path, problem: str = "", *kinds: type[BaseException]) -> Iterator[None]:
    """Raise exceptions of these kinds as `UsageError("source: problem (first line)")`.

    A UsageError is raised again with `source: ` before its message.
    """
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    except kinds as error:
        raise UsageError(f"{source}: {problem} ({first_line(error)})") from None


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar of `names`, or an empty string if none is similar."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def lookup(table: Mapping[str, T], name: str, flag: str, also: str = "") -> T:
    """Return the entry of `table` called `name`.

    Raises UsageError, with `flag`, the most similar name and all names (and `also`), if there is none.
    """
    if name not in table:
        known = ", ".join([*table, *filter(None, [also])])
        raise UsageError(f"{flag}: unknown name {name!r}{suggestion(name, table)} (known: {known})")
    return table[name]
