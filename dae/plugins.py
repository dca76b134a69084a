"""The door for a function in a file of the user's own: `path/to/my_losses.py:my_loss` in place of a built-in name.

The file is a program: naming it runs it. It may import what is installed, but not files beside it, since it alone is
kept with the run: a run's folder has a copy in `code/`, and the run's config.json names that copy, relative to its
own folder, with the SHA-256 of its text, `code/my_losses.py:my_loss@SHA256`. A file whose text has another one is
refused before it is run. So whoever resumes, reruns or tests a run uses what it was really trained with.
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

from dae import errors
from dae.errors import UsageError, nearest

T = TypeVar("T")

# After the start, a space, + or *, so that it may be a term of a sum. Only an absolute path may hold + and *: what is
# made absolute may lie in any folder.
REFERENCE = (
    r"(?<![^\s+*])(?P<path>/.*?\.py|[^\s+*/:][^+*:]*?\.py):(?P<function>\w+)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?(?=\s*(?:\+|$))"
)
_REFERENCE = re.compile(REFERENCE)
# How a function given to dae.train stands in a configuration.
_GIVEN = re.compile(r"python:(?P<function>\w+)@(?P<digest>[0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A function in a Python file, and the SHA-256 that the file must have, if any."""

    path: str
    function: str
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" + (f"@{self.digest}" if self.digest else "")

    def read(self, flag: str) -> bytes:
        """The file's content; raises UsageError where it cannot be read or is not what the digest says."""
        try:
            if not os.path.isfile(self.path):  # a pipe or device might never end
                raise FileNotFoundError(None, "no such file")
            with open(self.path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"{flag}: {self.path}: cannot be read ({error.strerror})") from None
        if self.digest not in (None, _digest(content)):
            raise UsageError(
                f"{flag}: {self.path}: its text is not what the run was made with "
                f"(SHA-256 {_digest(content)}, not {self.digest})"
            )
        return content


def references(text: str) -> list[Reference]:
    """The functions of users' files that a setting names."""
    return [Reference(**found.groupdict()) for found in _REFERENCE.finditer(text)]


def substitute(text: str, change: Callable[[Reference], object]) -> str:
    """`text` with each reference in it changed."""
    return _REFERENCE.sub(lambda found: str(change(Reference(**found.groupdict()))), text)


def pinned(text: str, flag: str) -> str:
    """`text` with every reference made absolute, and with the digest of its file where it has none."""

    def pin(reference: Reference) -> Reference:
        path = os.path.abspath(os.path.expanduser(reference.path))
        absolute = dataclasses.replace(reference, path=path)
        return absolute if reference.digest else dataclasses.replace(absolute, digest=_digest(absolute.read(flag)))

    return substitute(text, pin)


def located(text: str, folder: str | os.PathLike) -> str:
    """`text` with every relative path in it taken as relative to `folder`."""
    return substitute(text, lambda one: dataclasses.replace(one, path=os.path.join(os.path.abspath(folder), one.path)))


def label(text: str) -> str:
    """`text` for a reader: of each reference, the function's name alone."""
    return _GIVEN.sub(r"\g<function>", substitute(text, lambda one: one.function))


def distinct(names: Iterable[str], separator: str = "-") -> list[str]:
    """The names, with a number from the second of each on: a, b, a-2."""
    taken: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}{separator}{number}" for number in itertools.count(2)))
        taken.append(next(candidate for candidate in candidates if candidate not in taken))
    return taken


def given(function: Callable) -> tuple[str, str]:
    """How a function that is given as such stands in a configuration, and its source, as far as Python knows it."""
    name = re.sub(r"\W", "", getattr(function, "__name__", type(function).__name__))
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        source = ""
        print(f"warning: {name} has no source to be read, so that no resume can tell it from another", file=sys.stderr)
    return f"python:{name}@{_digest(source.encode())}", source


def is_given(text: str) -> bool:
    """Whether a setting says that a function was given as such, from Python."""
    return _GIVEN.fullmatch(text) is not None


def choose(table: Mapping[str, T], name: str, flag: str) -> T:
    """The entry of `table` called `name`, or the function that `name` says is in a file, which is run to get it.

    Raises UsageError naming `flag` where there is neither.
    """
    found = _REFERENCE.fullmatch(name)
    if found is None:
        return errors.choose(table, name, flag, "or FILE.py:FUNCTION of your own")
    reference = Reference(**found.groupdict())
    content = reference.read(flag)
    file = os.path.abspath(reference.path)
    with blaming(f"{flag}: {reference.path}", file):
        module = _module(file, content)
    function = vars(module).get(reference.function)
    if not callable(function):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UsageError(
            f"{flag}: {reference.path}: has no function {reference.function!r}{nearest(reference.function, own)} "
            f"(it has: {', '.join(own) or 'none'})"
        )
    return function


@contextlib.contextmanager
def blaming(culprit: str, file: str) -> Iterator[None]:
    """Turns whatever the code in `file` raises in the block into a UsageError naming `culprit` and the line."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        said = str(error).strip()
        if isinstance(error, SyntaxError) and error.filename == file:
            lines, said = [error.lineno], error.msg
        if said.startswith("in user code:"):  # of a graph: TensorFlow's traceback in words, with the reason at its end
            lines = [int(number) for number in re.findall(rf'File "{re.escape(file)}", line (\d+)', said)]
            said = said.splitlines()[-1].strip().removeprefix(f"{type(error).__name__}: ")
        reason = f"{type(error).__name__}: {said.splitlines()[0].strip()}" if said else type(error).__name__
        raise UsageError(f"{culprit}: fails{f' in line {lines[-1]}' if lines else ''} ({reason})") from error


@functools.lru_cache(maxsize=64)
def _module(path: str, content: bytes) -> types.ModuleType:
    """The file run as a module, once for each text that it has in this process."""
    module = types.ModuleType(f"dae_user_code_{_digest(path.encode() + content)}")
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
