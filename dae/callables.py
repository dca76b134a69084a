"""How a configuration records Python functions that are passed to `dae.train` in place of names.

The digest of a function covers its source code and what it captures: variables of enclosing functions, default values,
arguments of `functools.partial`, attributes of the object that a method is bound to, and globals. Of these it covers
plain values, containers and NumPy arrays of them, and the user's functions, classes and objects. Those of
installed packages count by name, because a run records the versions.
"""

import dis
import hashlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dae import plugins
from dae.errors import listed

_PLAIN = (type(None), type(...), bool, float, complex, str, bytes, range)
# Attributes in which Python, NumPy and TensorFlow keep the function that is decorated, bound, or a property, ...
_WRAPPED = ("__wrapped__", "__func__", "func", "fget", "python_function")
# ... and what goes with it.
_WITH_WRAPPED = ("__self__", "args", "keywords", "fset")


def record(function: Callable, field: str) -> tuple[str, str]:
    """Return the text by which this field of a configuration records `function`, and the function's source code.

    From now on, `plugins.load` returns the function for this text. Warns of captured values that the digest does not
    cover, and if Python cannot find the source, which is then empty.
    """
    inner = _innermost(function)
    name = getattr(inner, "__name__", None)
    name = re.sub(r"\W", "", name if isinstance(name, str) else "")[:80] or "function"
    walk, source = _Walk(), _source(inner)
    text = f"python:{name}@{walk.describe(function, name)}"
    prefix = f"warning: --{field}: {name}:"
    if walk.uncovered:
        values = listed(walk.uncovered)
        print(f"{prefix} cannot record {values}; a resume cannot check that this is unchanged", file=sys.stderr)
    if not source:
        print(f"{prefix} no source code found, so none is kept with the run", file=sys.stderr)
    plugins.register(text, function)
    return text, source


def _innermost(function: Any) -> Any:
    """Return the function within partial functions and decorators, or the class of an object that is called."""
    for _ in range(100):  # a function can wrap itself
        wrapped = [each for name in _WRAPPED[:3] if (each := _attribute(function, name)) is not None]
        if not wrapped:
            break
        function = wrapped[0]
    is_named = isinstance(function, types.FunctionType | types.BuiltinFunctionType | type)
    return function if is_named else type(function)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute, or None if there is none; not one that `__getattr__` makes up."""
    try:
        return None if inspect.getattr_static(value, name, None) is None else getattr(value, name)
    except Exception:  # of any type, since a property runs the user's code
        return None


def _source(function: Any) -> str:
    """Return the source code of a function, code or class, or an empty string if Python cannot find it."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError, ValueError, IndexError, SyntaxError):
        pass
    if isinstance(function, type):  # one of a notebook, whose methods Python may find nevertheless
        return "\n".join(_source(value) for value in vars(function).values() if isinstance(value, types.FunctionType))
    return ""


class _Walk:
    """Makes digests of values that are the same in every process, and collects the values for which it cannot."""

    def __init__(self) -> None:
        self.uncovered: list[str] = []
        self._digests: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no identity is used twice
        self._open: list[int] = []

    def describe(self, value: Any, name: str) -> str:
        """Return a digest of `value`, which the user knows by `name`."""
        key = id(value)
        if key in self._open:
            return f"cycle {len(self._open) - self._open.index(key)}"
        if key not in self._digests:
            self._alive.append(value)
            self._open.append(key)
            try:
                parts = self._describe(value, type(value), name)
            except Exception:  # of any type, since this may run the user's code; RecursionError for deep nesting
                parts = self._not_covered(value, name)
            self._open.pop()
            self._digests[key] = hashlib.sha256(repr(parts).encode()).hexdigest()
        return self._digests[key]

    def _describe(self, value: Any, kind: type, name: str) -> Any:
        """Return plain values and digests that differ if `value` does."""
        if kind is int:
            return "int", hex(value)  # repr fails for thousands of digits
        if kind in _PLAIN:
            return kind.__name__, repr(value)
        if isinstance(value, PurePath | np.dtype | np.ufunc) or (kind.__name__ == "DType" and _is_installed(kind)):
            return kind.__name__, str(value)
        if kind.__name__ == "EagerTensor" or isinstance(value, np.generic):
            value = np.asarray(value)
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return "array", value.shape, self.describe(value.ravel().tolist(), name)
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes())
            return "array", value.dtype.str, value.shape, content.hexdigest()
        if isinstance(value, list | tuple):
            return kind.__name__, [self.describe(item, f"{name}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, dict):
            return kind.__name__, [
                (self.describe(key, f"a key of {name}"), self.describe(item, f"{name}[{key!r}]"))
                for key, item in value.items()
            ]
        if isinstance(value, set | frozenset):
            return kind.__name__, sorted(self.describe(item, f"an item of {name}") for item in value)
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__) if _is_installed(value) else self._not_covered(value, name)
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            return "builtin", value.__qualname__, None if _is_module(owner) else self.describe(owner, name)
        if isinstance(value, types.FunctionType | type) and _is_installed(value):
            return "installed", value.__module__, value.__qualname__
        if isinstance(value, types.FunctionType):
            return self._describe_function(value, name)
        if isinstance(value, type):
            return self._describe_class(value)
        if not _is_installed(kind):
            return "object", self.describe(kind, kind.__name__), self._parts(vars(value), name)
        wrapped = {each: part for each in _WRAPPED if (part := _attribute(value, each)) is not None}
        if not wrapped:
            return self._not_covered(value, name)
        others = {each: part for each in _WITH_WRAPPED if (part := _attribute(value, each)) is not None}
        return kind.__name__, self._parts(wrapped | others, name)

    def _describe_function(self, function: types.FunctionType, name: str) -> Any:
        codes = list(_codes(function.__code__))
        # Python finds the source of a lambda with the rest of its lines only, such as another lambda, or `resume=True`.
        is_lambda = function.__code__.co_name == "<lambda>"
        source = (not is_lambda and _source(function.__code__)) or [
            (code.co_code, code.co_names, [repr(each) for each in code.co_consts if type(each) in (int, *_PLAIN)])
            for code in codes
        ]
        captured = {}
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                captured[variable] = cell.cell_contents
            except ValueError:  # not assigned yet
                captured[variable] = ...
        instructions = (one for code in codes for one in dis.get_instructions(code))
        names = {one.argval for one in instructions if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        named = {each: function.__globals__[each] for each in names if each in function.__globals__}
        defaults = {"defaults": function.__defaults__, "keyword defaults": function.__kwdefaults__}
        return "function", source, self._parts(captured), self._parts(named), self._parts(defaults, name)

    def _describe_class(self, kind: type) -> Any:
        own = {
            name: value
            for name, value in vars(kind).items()
            # Others are made by Python or by `dataclass`, from what the source says.
            if not name.startswith(("__", "_abc_"))
            or (isinstance(value, types.FunctionType) and value.__code__.co_filename != "<string>")
        }
        return "class", _source(kind), [self.describe(base, base.__name__) for base in kind.__bases__], self._parts(own)

    def _parts(self, parts: dict[str, Any], owner: str = "") -> list[tuple[str, str]]:
        prefix = f"{owner}." if owner else ""
        return [(name, self.describe(part, prefix + name)) for name, part in sorted(parts.items())]

    def _not_covered(self, value: Any, name: str) -> Any:
        self.uncovered.append(f"{name} (of the type {type(value).__name__})")
        return "not covered", name


def _is_module(value: Any) -> bool:
    return value is None or isinstance(value, types.ModuleType)


def _is_installed(value: Any) -> bool:
    """Return whether a module, or the module of a function or class, is Python's, of a package, or this package's."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    if name in (None, "builtins", *sys.builtin_module_names):
        return not isinstance(value, types.FunctionType)  # a function in Python without a module is the user's
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:  # such as __main__ of a notebook
        return False
    path = Path(file).resolve()
    folders = (Path(sysconfig.get_path("stdlib")).resolve(), Path(__file__).resolve().parent)
    return bool({"site-packages", "dist-packages"} & {*path.parts}) or any(each in path.parents for each in folders)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function, and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
