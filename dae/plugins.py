"""Load functions from users' own files: `path/to/my_losses.py:my_loss` in place of a built-in name.

Naming a file runs it. It may import installed packages but no files beside it, because it alone is kept with the run:
the run's folder holds a copy in `code/`, and its config.json names that copy together with the SHA-256 of its content,
`code/my_losses.py:my_loss@SHA256`. A file with another digest is refused before it runs, so that whoever resumes,
reruns or evaluates a run uses the code that trained it.
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

# A reference starts the text or follows a space, + or *, so that it can be a term of a sum. Only an absolute path may
# contain + and *, since a file that is made absolute can lie in any folder.
REFERENCE = (
    r"(?<![^\s+*])(?P<path>/.*?\.py|[^\s+*/:][^+*:]*?\.py):(?P<function>\w+)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?(?=\s*(?:\+|$))"
)
_REFERENCE = re.compile(REFERENCE)
# How the configuration records a Python function that was passed to `dae.train`.
_CALLABLE = re.compile(r"python:(?P<function>\w+)@(?P<digest>[0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A function in a Python file, and the SHA-256 that the file must have, if it is known."""

    path: str
    function: str
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" + (f"@{self.digest}" if self.digest else "")

    def read(self, flag: str) -> bytes:
        """Return the file's content. Raises UsageError if it cannot be read or does not have the digest."""
        try:
            if not os.path.isfile(self.path):  # reading a pipe or a device might never end
                raise FileNotFoundError(None, "no such file")
            with open(self.path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"{flag}: {self.path}: cannot be read ({error.strerror})") from None
        if self.digest not in (None, _digest(content)):
            raise UsageError(
                f"{flag}: {self.path}: differs from the file the run was made with "
                f"(expected SHA-256 {self.digest}, got {_digest(content)})"
            )
        return content


def references(text: str) -> list[Reference]:
    """Return the functions of users' files that a setting names."""
    return [Reference(**match.groupdict()) for match in _REFERENCE.finditer(text)]


def substitute(text: str, change: Callable[[Reference], object]) -> str:
    """Return `text` with every reference replaced by `change(reference)`."""
    return _REFERENCE.sub(lambda match: str(change(Reference(**match.groupdict()))), text)


def with_absolute_paths_and_digests(text: str, flag: str) -> str:
    """Make every reference in `text` absolute, and add the digest of its file if it has none."""

    def resolve(reference: Reference) -> Reference:
        absolute = dataclasses.replace(reference, path=os.path.abspath(os.path.expanduser(reference.path)))
        return absolute if absolute.digest else dataclasses.replace(absolute, digest=_digest(absolute.read(flag)))

    return substitute(text, resolve)


def relative_to(text: str, folder: str | os.PathLike) -> str:
    """Resolve relative paths in `text` against `folder`."""
    return substitute(text, lambda one: dataclasses.replace(one, path=os.path.join(os.path.abspath(folder), one.path)))


def without_paths(text: str) -> str:
    """Return `text` with `function@digest` for each reference: equal texts mean equal code, wherever it lies."""
    return substitute(text, lambda one: f"{one.function}@{one.digest}")


def label(text: str) -> str:
    """Return `text` for display, with only the function's name for each reference."""
    return _CALLABLE.sub(r"\g<function>", substitute(text, lambda one: one.function))


def unique_names(names: Iterable[str], separator: str = "-") -> list[str]:
    """Number repeated names from the second on: a, b, a becomes a, b, a-2."""
    taken: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}{separator}{number}" for number in itertools.count(2)))
        taken.append(next(candidate for candidate in candidates if candidate not in taken))
    return taken


def from_callable(function: Callable) -> tuple[str, str]:
    """Return how the configuration records a Python function, and the function's source if Python knows it."""
    name = re.sub(r"\W", "", getattr(function, "__name__", type(function).__name__))
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        source = ""
        print(f"warning: {name} has no readable source; a resume cannot check that it is the same", file=sys.stderr)
    return f"python:{name}@{_digest(source.encode())}", source


def is_callable(text: str) -> bool:
    """Return whether a setting records a Python function that was passed to `dae.train`."""
    return _CALLABLE.fullmatch(text) is not None


def load(table: Mapping[str, T], name: str, flag: str) -> T:
    """Return the entry of `table` called `name`, or the function of a user's file that `name` refers to.

    Runs the file. Raises UsageError, with `flag`, if there is no such entry, file or function.
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
    """Raise whatever the code in `file` raises as a UsageError with `prefix` and the line number."""
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


# Not `importlib`: it reads the file again, which may have changed since its digest was checked, and writes a
# __pycache__ folder beside it.
@functools.lru_cache(maxsize=64)
def _run_module(path: str, content: bytes) -> types.ModuleType:
    """Run `content` as a module, once per process for each content of a file."""
    module = types.ModuleType(f"dae_plugin_{_digest(path.encode() + content)}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses, pickle and TensorFlow look it up
    try:
        exec(compile(content, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
