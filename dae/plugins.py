"""Functions from users' files and from Python, in place of built-in names.

`path/to/my_losses.py:my_loss` names a function in a file, which is run where it lies when a function is loaded from it.
It may import installed packages, and read the files in its folder that it lists as `FILES = ["features.keras"]`. All of
them are copied to `code/` in the run's folder, whose config.json names the copy with the SHA-256 of all of them,
`code/my_losses.py:my_loss@SHA256`. Files with another digest are rejected before they run, so that resuming, rerunning
or evaluating a run uses the code that trained it.

`python:my_loss@SHA256` records a Python function by its source code. Such a run is resumed with the function itself.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import linecache
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dae.errors import UsageError, as_usage_error, first_line, listed, lookup, shown, warn

# A reference stands at the start of the text or after a space, + or *, so that it can be a term of a sum. Only absolute
# paths may contain + and *: they arise when a relative path is made absolute, and its folder can have any name.
REFERENCE = (
    r"(?<![^\s+*])(?P<path>/.*?\.py|[^\s+*/:][^+*:]*?\.py):(?P<function>\w+)"
    r"(?:@(?P<digest>[0-9a-f]{64}))?(?=\s*(?:\+|$))"
)
_REFERENCE = re.compile(REFERENCE)
_CALLABLE = re.compile(r"python:(?P<function>\w+)@(?P<digest>[0-9a-f]{64})")


class _Recorded(NamedTuple):
    function: Callable
    source: str
    identity: object  # equal for functions that compute the same


# The Python functions of this process by the text that records them, and the modules by path and digest.
_RECORDED: dict[str, _Recorded] = {}
_MODULES: dict[tuple[str, str | None], types.ModuleType] = {}


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
        for listed_name in _names_in_files(files[name], f"{flag}: {self.path}"):
            files[listed_name] = _read(os.path.join(folder, listed_name), flag)
        if self.digest not in (None, _digest(*files.values())):
            raise UsageError(
                f"{flag}: {self.path}: differs from what the run was made with, with all in its FILES "
                f"(expected SHA-256 {self.digest}, got {_digest(*files.values())}); restore it"
            )
        return files


def _read(path: str, flag: str) -> bytes:
    with as_usage_error(f"{flag}: {path}", "cannot be read", OSError):
        if not os.path.isfile(path):  # reading a pipe or a device might never end
            raise FileNotFoundError("no such file")
        return Path(path).read_bytes()


def _names_in_files(content: bytes, prefix: str) -> list[str]:
    """Return the list FILES of a Python file without running it, or an empty list if there is none."""
    try:
        statements = ast.parse(content).body
    except (SyntaxError, ValueError):  # reported, with the line, when the file is run
        return []
    for statement in statements:
        value = getattr(statement, "value", None)
        if value is not None and re.match(r"FILES\b", ast.unparse(statement)):  # also with an annotation
            with contextlib.suppress(ValueError, TypeError):
                names = list(ast.literal_eval(value))
                if all(isinstance(name, str) and name == os.path.basename(name) for name in names):
                    return names
            raise UsageError(f"{prefix}: FILES: expected a list of names of files in the same folder")
    return []


def _digest(content: bytes, *dependencies: bytes) -> str:
    """Return the SHA-256 of a file, or that of the digests of several."""
    digests = [hashlib.sha256(file).hexdigest() for file in (content, *dependencies)]
    return digests[0] if not dependencies else _digest("".join(digests).encode())


def substitute(text: str, change: Callable[[Reference], object]) -> str:
    """Return `text`, such as a sum of losses, with every reference replaced by `change(reference)`."""
    return _REFERENCE.sub(lambda match: str(change(Reference(**match.groupdict()))), text)


def with_absolute_paths_and_digests(text: str, flag: str) -> str:
    """Return `text` with every reference's path made absolute, and its file's digest added if it has none.

    Raises UsageError, which names `flag`, if a file whose digest is needed cannot be read.
    """

    def resolve(found: Reference) -> Reference:
        found = dataclasses.replace(found, path=os.path.abspath(os.path.expanduser(found.path)))
        return dataclasses.replace(found, digest=found.digest or _digest(*found.read(flag).values()))

    return substitute(text, resolve)


def resolve_paths(text: str, folder: str | os.PathLike) -> str:
    """Return `text` with the paths of its references made absolute; relative ones are relative to `folder`."""
    return substitute(text, lambda found: dataclasses.replace(found, path=os.path.abspath(Path(folder, found.path))))


def without_paths(text: str) -> str:
    """Return `text` with each reference replaced by `function@digest`: equal results mean equal code in any folder."""
    return substitute(text, lambda found: f"{found.function}@{found.digest}")


def label(text: str) -> str:
    """Return `text` for display, with each reference replaced by the name of its function."""
    return _CALLABLE.sub(r"\g<function>", substitute(text, lambda found: found.function))


def source(text: str) -> str:
    """Return `text` for error messages, without digests."""
    return _CALLABLE.sub(r"\g<function>", substitute(text, lambda found: f"{found.path}:{found.function}"))


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


def record(function: Any, field: str) -> str:
    """Return the text that records a Python function in this field of a configuration; `load` then finds it.

    Its digest is that of the source code, or of the bytecode of a lambda or without source code, and of simple default
    values. What else the function captures is not part of it: this is warned of, and a further function of this process
    that differs in nothing else gets a number into its digest, so that they are not confused. Raises UsageError for
    anything that is not a function or class written in Python.
    """
    inner, captured = _unwrapped(function)
    methods = _methods(inner)
    if not methods:
        raise UsageError(f"--{field}: expected a function or class written in Python, got {shown(function)}")
    name, code = re.sub(r"\W", "", inner.__name__), ""
    # Since Python 3.13, the source of all code in "<string>" is taken to be that of `python -c`.
    if file_of(inner) != "<string>":
        with contextlib.suppress(OSError, TypeError):
            code = inspect.getsource(inner)
    # Python finds the source of a lambda with the rest of its lines only, such as another lambda, or `resume=True`.
    content = code if code and name != "lambda" else repr([_bytecode(method.__code__) for method in methods])
    defaults = [
        value for method in methods for value in (*(method.__defaults__ or ()), *(method.__kwdefaults__ or {}).values())
    ]
    if all(isinstance(value, int | float | str | None) for value in defaults):
        content += repr(defaults)
    else:
        captured.append("default values")
    # A function that is defined again, as in a notebook, is the same; one that another function makes again is not.
    identity = id(getattr(function, "__self__", function)) if captured else inner.__module__
    for number in itertools.count(1):
        text = f"python:{name}@{_digest(repr((content, number)).encode())}"
        known = _RECORDED.get(text)
        if known is None or known.identity == identity:
            break
    if captured and known is None:
        warn(f"--{field}: {name}: a resume cannot check that this has not changed: {listed(captured)}")
    _RECORDED[text] = _Recorded(function, code, identity)
    return text


def is_recorded_callable(text: str) -> bool:
    """Return whether a setting records a Python function."""
    return _CALLABLE.fullmatch(text) is not None


def is_lost(text: str) -> bool:
    """Return whether a setting records a Python function that is not known in this process."""
    return is_recorded_callable(text) and text not in _RECORDED


def sources(texts: Iterable[str]) -> dict[str, str]:
    """Return the source code of the recorded Python functions among `texts`, by unique file name, where it is known."""
    known = {text: _RECORDED[text].source for text in texts if text in _RECORDED and _RECORDED[text].source}
    return {f"{name}.py": code for name, code in zip(unique_names(map(label, known)), known.values(), strict=True)}


def load(table: Mapping[str, Any], name: str, flag: str) -> Any:
    """Return the entry of `table` called `name`, or the function that `name` refers to or records.

    Runs the user's file that it refers to, once per process for each path and digest: later edits have no effect on a
    name with a digest. Raises UsageError, which names `flag`, if there is no such entry, file or function, if running
    the file fails, or if the recorded function is not known in this process.
    """
    if is_lost(name):
        raise UsageError(f"{flag}: {label(name)} was a Python function; pass it again from Python")
    if name in _RECORDED:
        return _RECORDED[name].function
    match = _REFERENCE.fullmatch(name)
    if match is None:
        return lookup(table, name, flag, "or your own FILE.py:FUNCTION")
    reference = Reference(**match.groupdict())
    functions = {name: value for name, value in vars(_module(reference, flag)).items() if callable(value)}
    return lookup(functions, reference.function, f"{flag}: {reference.path}")


def _module(reference: Reference, flag: str) -> types.ModuleType:
    """Return the module of a file, and run the file unless this process has run it with the same path and digest.

    `importlib` would read the file again, which may have changed since its digest was checked, and write a folder
    `__pycache__` beside it.
    """
    path = os.path.abspath(reference.path)
    key = path, reference.digest or _digest(*reference.read(flag).values())
    if key not in _MODULES:
        content = next(iter(reference.read(flag).values()))
        module = types.ModuleType(f"dae_plugin_{_digest(repr(key).encode())}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # dataclasses, pickle and TensorFlow look it up there
        with errors_with_line(f"{flag}: {reference.path}", path), without_registered():
            exec(compile(content, path, "exec", dont_inherit=True), vars(module))
        # TensorFlow reads the source code when it makes a graph, which may be after an edit.
        linecache.cache[path] = (len(content), None, content.decode(errors="replace").splitlines(True), path)
        _MODULES[key] = module
    return _MODULES[key]


@contextlib.contextmanager
def without_registered() -> Iterator[None]:
    """Hide what is registered with Keras, and then undo what the block registers.

    So several files can register the same name for different classes.
    """
    import keras  # which the help of the scripts need not wait for

    registered = keras.saving.get_custom_objects()
    before = dict(registered)
    registered.clear()
    try:
        yield
    finally:
        registered.clear()
        registered.update(before)


def _unwrapped(function: Any) -> tuple[Any, list[str]]:
    """Return the function or class within a partial, decorated or bound function, and what it captures."""
    captured = []
    while not isinstance(function, type):
        if isinstance(function, functools.partial):
            captured.append("arguments of partial")
            function = function.func
        elif inspect.ismethod(function):
            captured.append("self")
            function = function.__func__
        elif hasattr(function, "__wrapped__"):  # `tf.function` has it too
            captured += ["decorator"] * inspect.isfunction(function)
            function = function.__wrapped__
        else:
            break
    variables = dict.fromkeys(name for method in _methods(function) for name in method.__code__.co_freevars)
    return function, captured + [name for name in variables if name != "__class__"]  # that of `super()`


def _methods(function: Any) -> list[types.FunctionType]:
    """Return the methods of a class, or the function itself, as far as they are written in Python."""
    return list(filter(inspect.isfunction, vars(function).values() if isinstance(function, type) else [function]))


def _bytecode(code: types.CodeType) -> str:
    """Return the instructions and constants of a function, without line numbers."""
    constants = [_bytecode(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def file_of(function: Callable) -> str:
    """Return the file that defines the function, or an empty string."""
    return next((method.__code__.co_filename for method in _methods(_unwrapped(function)[0])), "")


@contextlib.contextmanager
def errors_with_line(prefix: str, file: str) -> Iterator[None]:
    """Turn any exception in the block into a UsageError with `prefix` and the number of the line in `file`."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        message, reason = str(error).strip(), first_line(error)
        if message.startswith("in user code:"):  # TensorFlow puts the traceback of a graph into the message
            lines = [int(number) for number in re.findall(rf'File "{re.escape(file)}", line (\d+)', message)]
            reason = message.splitlines()[-1].strip().removeprefix(f"{type(error).__name__}: ")
        reason = f"{type(error).__name__}: {reason}" if message else type(error).__name__
        raise UsageError(f"{prefix}: fails{f' in line {lines[-1]}' if lines else ''} ({reason})") from error
