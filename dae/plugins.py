"""Load functions from users' own files: `path/to/my_losses.py:my_loss` in place of a built-in name.

A file is run when a function is loaded from it. It may import installed packages, but not files beside it, because only
the file itself is kept with the run: the run's folder holds a copy in `code/`, and its config.json names that copy
together with the SHA-256 of its content, `code/my_losses.py:my_loss@SHA256`. A file with another digest is refused
before it runs, so that resuming, rerunning or evaluating a run uses the code that trained it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from dae.errors import UsageError, lookup, suggestion

T = TypeVar("T")

# A reference stands at the start of the text or after a space, + or *, so that it can be a term of a sum. Only absolute
# paths may contain + and *: they arise when a relative path is made absolute, and its folder can have any name.
REFERENCE = (
    r"(?<![^\s+*])(?P<path>/.*?\.py|[^\s+*/:][^+*:]*?\.py):(?P<function>\w+)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?(?=\s*(?:\+|$))"
)
_REFERENCE = re.compile(REFERENCE)
# The configuration records a Python function that was passed to `dae.train` in this form.
_CALLABLE = re.compile(r"python:(?P<function>\w+)@(?P<digest>[0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference to a function in a Python file; `digest` is the SHA-256 that the file must have, or None for any."""

    path: str
    function: str
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" + (f"@{self.digest}" if self.digest else "")

    def read(self, flag: str) -> bytes:
        """Return the content of the file. Raises UsageError if it cannot be read or has another digest."""
        try:
            if not os.path.isfile(self.path):  # reading a pipe or a device might never end
                raise FileNotFoundError(None, "no such file")
            with open(self.path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"{flag}: {self.path}: cannot be read ({error.strerror})") from None
        if self.digest not in (None, _digest(content)):
            raise UsageError(
                f"{flag}: {self.path}: differs from the file that the run was made with "
                f"(expected SHA-256 {self.digest}, got {_digest(content)}); restore that file"
            )
        return content


def references(text: str) -> list[Reference]:
    """Return all references in the text of a setting, in order."""
    return [Reference(**match.groupdict()) for match in _REFERENCE.finditer(text)]


def substitute(text: str, change: Callable[[Reference], object]) -> str:
    """Return `text` with every reference replaced by `change(reference)`."""
    return _REFERENCE.sub(lambda match: str(change(Reference(**match.groupdict()))), text)


def with_absolute_paths_and_digests(text: str, flag: str) -> str:
    """Return `text` with every reference's path made absolute, and its file's digest added if it has none.

    Raises UsageError, which names `flag`, if a file whose digest is needed cannot be read.
    """

    def resolve(reference: Reference) -> Reference:
        absolute = dataclasses.replace(reference, path=os.path.abspath(os.path.expanduser(reference.path)))
        return absolute if absolute.digest else dataclasses.replace(absolute, digest=_digest(absolute.read(flag)))

    return substitute(text, resolve)


def resolve_paths(text: str, folder: str | os.PathLike) -> str:
    """Return `text` with the paths of its references made absolute; relative ones are relative to `folder`."""
    return substitute(text, lambda one: dataclasses.replace(one, path=os.path.join(os.path.abspath(folder), one.path)))


def without_paths(text: str) -> str:
    """Return `text` with each reference replaced by `function@digest`: equal results mean equal code in any folder."""
    return substitute(text, lambda one: f"{one.function}@{one.digest}")


def label(text: str) -> str:
    """Return `text` for display, with each reference replaced by the name of its function."""
    return _CALLABLE.sub(r"\g<function>", substitute(text, lambda one: one.function))


def unique_names(names: Iterable[str], separator: str = "-") -> list[str]:
    """Return `names` with a number appended to each repeated one: a, b, a becomes a, b, a-2."""
    taken: list[str] = []
    for name in names:
        taken.append(next(candidate for candidate in numbered(name, separator) if candidate not in taken))
    return taken


def numbered(name: str, separator: str = "-", suffix: str = "") -> Iterator[str]:
    """Yield `name`, then `name` with the numbers from 2 appended: a, a-2, a-3, ..., each followed by `suffix`."""
    yield name + suffix
    yield from (f"{name}{separator}{number}{suffix}" for number in itertools.count(2))


def record_callable(function: Callable) -> tuple[str, str]:
    """Return the text by which the configuration records a Python function, and the function's source code.

    Warns, and returns an empty source, if Python cannot find the source.
    """
    name = re.sub(r"\W", "", getattr(function, "__name__", type(function).__name__))
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        source = ""
        print(f"warning: {name}: no source code found; a resume cannot check that it is unchanged", file=sys.stderr)
    return f"python:{name}@{_digest(source.encode())}", source


def is_recorded_callable(text: str) -> bool:
    """Return whether a setting records a Python function that was passed to `dae.train`."""
    return _CALLABLE.fullmatch(text) is not None


def load(table: Mapping[str, T], name: str, flag: str) -> T:
    """Return the entry of `table` called `name`, or the function of a user's file that `name` refers to.

    Runs the file. Raises UsageError, which names `flag`, if there is no such entry, file or function, or if running the
    file fails.
    """
    match = _REFERENCE.fullmatch(name)
    if match is None:
        return lookup(table, name, flag, "or your own FILE.py:FUNCTION")
    reference = Reference(**match.groupdict())
    content = reference.read(flag)
    file = os.path.abspath(reference.path)
    with errors_with_line(f"{flag}: {reference.path}", file):
        module = _run_module(file, content)
    function = vars(module).get(reference.function)
    if not callable(function):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UsageError(
            f"{flag}: {reference.path}: no function {reference.function!r}{suggestion(reference.function, own)} "
            f"(functions: {', '.join(own) or 'none'})"
        )
    return function


@contextlib.contextmanager
def errors_with_line(prefix: str, file: str) -> Iterator[None]:
    """Turn any exception in the block into a UsageError with `prefix` and the number of the line in `file`."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        message = str(error).strip()
        if isinstance(error, SyntaxError) and error.filename == file:
            lines, message = [error.lineno], error.msg
        if message.startswith("in user code:"):  # TensorFlow puts the traceback of a graph into the message
            lines = [int(number) for number in re.findall(rf'File "{re.escape(file)}", line (\d+)', message)]
            message = message.splitlines()[-1].strip().removeprefix(f"{type(error).__name__}: ")
        reason = f"{type(error).__name__}: {message.splitlines()[0].strip()}" if message else type(error).__name__
        raise UsageError(f"{prefix}: fails{f' in line {lines[-1]}' if lines else ''} ({reason})") from error


# `importlib` is not used, because it would read the file again, which may have changed since its digest was checked,
# and write a __pycache__ folder beside it.
@functools.lru_cache(maxsize=64)
def _run_module(path: str, content: bytes) -> types.ModuleType:
    """Run `content` as a module and return it; the same content of a file is run only once per process."""
    module = types.ModuleType(f"dae_plugin_{_digest(path.encode() + content)}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses, pickle and TensorFlow look it up there
    try:
        exec(compile(content, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
