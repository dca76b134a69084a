"""Load functions from users' own files: `path/to/my_losses.py:my_loss` in place of a built-in name.

A file is run when a function is loaded from it. It may import installed packages, and read the files in its folder that
it lists as `FILES = ["features.keras"]`, in the folder of `__file__`. It is kept with the run together with these: the
run's folder holds copies in `code/`, and its config.json names the copy with the SHA-256 of all of them,
`code/my_losses.py:my_loss@SHA256`. Files with another digest are refused before they run, so that resuming, rerunning
or evaluating a run uses the code that trained it. To show a missing entry of FILES at the start of a run, not only when
it is resumed, `__file__` is in a temporary folder that holds nothing but these files.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import os
import re
import shutil
import sys
import tempfile
import traceback
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar, cast

from dae.errors import UsageError, lookup, suggestion

T = TypeVar("T")

# A reference stands at the start of the text or after a space, + or *, so that it can be a term of a sum. Only absolute
# paths may contain + and *: they arise when a relative path is made absolute, and its folder can have any name.
REFERENCE = (
    r"(?<![^\s+*])(?P<path>/.*?\.py|[^\s+*/:][^+*:]*?\.py):(?P<function>\w+)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?(?=\s*(?:\+|$))"
)
_REFERENCE = re.compile(REFERENCE)
# Prefix of the temporary folders of users' files.
_TEMPORARY = "dae-plugin-"
# The configuration records a Python function that was passed to `dae.train` in this form.
_CALLABLE = re.compile(r"python:(?P<function>\w+)@(?P<digest>[0-9a-f]{64})")
# The functions of this process by that text.
_REGISTERED: dict[str, Callable] = {}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference to a function in a Python file.

    `digest` is the SHA-256 that the file must have, together with the files in its FILES; None for any.
    """

    path: str
    function: str
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" + (f"@{self.digest}" if self.digest else "")

    def read(self, flag: str) -> dict[str, bytes]:
        """Return the content of the file, and then of those in its FILES, by name.

        Raises UsageError if one of them cannot be read, or if they have another digest.
        """
        folder, name = os.path.split(self.path)
        files = {name: _read(self.path, flag)}
        for other in _names_in_files(files[name], f"{flag}: {self.path}"):
            files[other] = _read(os.path.join(folder, other), flag)
        if self.digest not in (None, _digest(*files.values())):
            kept = "files" if len(files) > 1 else "file"
            raise UsageError(
                f"{flag}: {self.path}: differs from the {kept} that the run was made with "
                f"(expected SHA-256 {self.digest}, got {_digest(*files.values())}); restore the {kept}"
            )
        return files


def _read(path: str, flag: str) -> bytes:
    try:
        if not os.path.isfile(path):  # reading a pipe or a device might never end
            raise FileNotFoundError(None, "no such file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{flag}: {path}: cannot be read ({error.strerror})") from None


def _names_in_files(content: bytes, prefix: str) -> list[str]:
    """Return the list FILES of a Python file without running it, or an empty list if there is none."""
    try:
        statements = ast.parse(content).body
    except (SyntaxError, ValueError):  # reported, with the line, when the file is run
        return []
    for statement in statements:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if "FILES" in [target.id for target in targets if isinstance(target, ast.Name)]:
            try:
                names = ast.literal_eval(statement.value)
            except (ValueError, TypeError):
                names = None
            names = names if isinstance(names, list | tuple) else [None]
            if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
                raise UsageError(f"{prefix}: FILES: expected a list of names of files in the same folder")
            return list(names)
    return []


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
        if absolute.digest:
            return absolute
        return dataclasses.replace(absolute, digest=_digest(*absolute.read(flag).values()))

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


def source(text: str) -> str:
    """Return `text` for error messages, without digests."""
    return _CALLABLE.sub(r"\g<function>", substitute(text, lambda one: f"{one.path}:{one.function}"))


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


def register(text: str, function: Callable) -> None:
    """Let `load` return a Python function for the text that records it."""
    _REGISTERED[text] = function


def call_with(argument: str, function: str, config: str) -> str:
    """Return how `dae.train` is called with a function in place of the name in the field `argument`."""
    return f"dae.train({config}, {argument}={f'[{function}]' if argument == 'metrics' else function})"


def is_recorded_callable(text: str) -> bool:
    """Return whether a setting records a Python function that was passed to `dae.train`."""
    return _CALLABLE.fullmatch(text) is not None


def load(table: Mapping[str, T], name: str, flag: str) -> T:
    """Return the entry of `table` called `name`, or the function that `name` refers to or records.

    Runs the user's file that it refers to. Raises UsageError, which names `flag`, if there is no such entry, file or
    function, if running the file fails, or if the recorded function has not been passed to `dae.train` in this process.
    """
    if is_recorded_callable(name):
        if name not in _REGISTERED:
            call = call_with(flag.removeprefix("--"), label(name), "config")
            raise UsageError(f"{flag}: {label(name)} was a Python function; pass it again: {call}")
        return cast(T, _REGISTERED[name])
    match = _REFERENCE.fullmatch(name)
    if match is None:
        return lookup(table, name, flag, "or your own FILE.py:FUNCTION")
    reference = Reference(**match.groupdict())
    files = reference.read(flag)
    file = os.path.abspath(reference.path)
    with errors_with_line(f"{flag}: {reference.path}", file):
        module = _run_module(file, tuple(files.items()))
    function = vars(module).get(reference.function)
    if not callable(function):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UsageError(
            f"{flag}: {reference.path}: no function {reference.function!r}{suggestion(reference.function, own)} "
            f"(functions: {', '.join(own) or 'none'})"
        )
    return function


def file_of(function: Callable) -> str:
    """Return the file that defines the function, or an empty string."""
    while isinstance(function, functools.partial):
        function = function.func
    with contextlib.suppress(ValueError):  # a function can wrap itself
        function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else ""


def parameters_of(function: Callable, prefix: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function by name. Raises UsageError with `prefix` if Python does not know them."""
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError) as error:  # as for some functions that are not written in Python
        raise UsageError(f"{prefix}: its parameters are unknown ({error})") from None


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
        if _TEMPORARY in message:
            prefix += ": reads a file that is not in its FILES"
        reason = f"{type(error).__name__}: {message.splitlines()[0].strip()}" if message else type(error).__name__
        raise UsageError(f"{prefix}: fails{f' in line {lines[-1]}' if lines else ''} ({reason})") from error


# `importlib` is not used, because it would read the file again, which may have changed since its digest was checked,
# and write a __pycache__ folder beside it.
@functools.lru_cache(maxsize=64)
def _run_module(path: str, files: tuple[tuple[str, bytes], ...]) -> types.ModuleType:
    """Run the first of `files` as a module and return it; the same files are run only once per process."""
    module = types.ModuleType(f"dae_plugin_{_digest(path.encode(), *(content for _, content in files))}")
    folder = tempfile.mkdtemp(prefix=_TEMPORARY)
    weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
    for name, content in files:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    module.__file__ = os.path.join(folder, files[0][0])
    sys.modules[module.__name__] = module  # dataclasses, pickle and TensorFlow look it up there
    try:
        exec(compile(files[0][1], path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _digest(content: bytes, *others: bytes) -> str:
    """Return the SHA-256 of a file, or that of the digests of several."""
    digests = [hashlib.sha256(each).hexdigest() for each in (content, *others)]
    return digests[0] if not others else _digest("".join(digests).encode())
