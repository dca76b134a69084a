"""Python functions that are passed to `dae.train` in place of names."""

import dataclasses
import functools
import json
import math
import operator
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, run_in_process
from hypothesis import given, settings
from hypothesis import strategies as st

import dae
from dae import callables, plugins
from dae import config as config_module
from dae.errors import UsageError
from dae.workdir.workdir import read_metrics


def digest(function: Callable) -> str:
    return callables.record(function, "loss")[0].partition("@")[2]


def in_closure(value: Any) -> Callable:
    def loss(clean, denoised):
        return value

    return loss


def in_nested_closure(value: Any) -> Callable:
    return in_closure(in_closure(value))


def in_default(value: Any) -> Callable:
    def loss(clean, denoised, value=value):
        return value

    return loss


def in_keyword_default(value: Any) -> Callable:
    def loss(clean, denoised, *, value=value):
        return value

    return loss


def three(value, clean, denoised):
    return value


def in_partial(value: Any) -> Callable:
    return functools.partial(three, value)


def in_keyword_of_partial(value: Any) -> Callable:
    return functools.partial(three, value=value)


@dataclasses.dataclass
class Scaled:
    value: Any

    def loss(self, clean, denoised):
        return self.value

    def __call__(self, clean, denoised):
        return self.value


def in_bound_method(value: Any) -> Callable:
    return Scaled(value).loss


def in_object(value: Any) -> Callable:
    return Scaled(value)


def in_decorator(value: Any) -> Callable:
    def decorator(function):
        @functools.wraps(function)
        def wrapper(*arguments):
            return value * function(*arguments)

        return wrapper

    @decorator
    def loss(clean, denoised):
        return 1

    return loss


def in_graph(value: Any) -> Callable:
    return tf.function(in_closure(value))


def in_class(value: Any) -> Callable:
    class Loss(keras.Layer):
        def call(self, clean, denoised):
            return value

    return Loss


def in_global(value: Any) -> Callable:
    """A function that calls another one, which names the global STRENGTH."""
    module: dict[str, Any] = {"STRENGTH": value}
    source = "def helper(clean): return STRENGTH\ndef loss(clean, denoised): return [helper(each) for each in clean]\n"
    exec(source, module)
    return module["loss"]


CAPTURES = [
    *(in_closure, in_nested_closure, in_default, in_keyword_default, in_partial, in_keyword_of_partial),
    *(in_bound_method, in_object, in_decorator, in_graph, in_class, in_global),
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("capture", CAPTURES)
@settings(max_examples=15)
@given(PLAIN, PLAIN)
def test_digest_differs_exactly_if_the_captured_value_does(capture, value, other):
    assert digest(capture(value)) == digest(capture(json.loads(json.dumps(value)) if is_json(value) else value))
    assert (digest(capture(value)) == digest(capture(other))) == (repr(value) == repr(other))


def is_json(value: Any) -> bool:
    """Return whether JSON gives an equal copy of the value, with its types."""
    return repr(json.loads(json.dumps(value))) == repr(value)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (np.array([1.0, 2.0]), np.array([1.0, 2.5])),
        (np.array([1.0, 2.0]), np.array([[1.0, 2.0]])),
        (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (np.float32(0.5), np.float64(0.5)),
        (tf.constant([1.0, 2.0]), tf.constant([1.0, 3.0])),
        (tf.float32, tf.float64),
        (math.sin, math.cos),
        (tf.reduce_mean, tf.reduce_sum),
        (np.add, np.subtract),
        (keras.layers.Conv2D, keras.layers.Dense),
        ({"a", "b"}, {"a", "c"}),
        (lambda x: x + 1, lambda x: x + 2),
        (Scaled(1), Scaled(2)),
        (Scaled(Scaled([1])), Scaled(Scaled([2]))),
        (Scaled, in_closure),
        (Path("a"), Path("b")),
        (10**5000, 10**5000 + 1),
        (["a"].append, ["b"].append),
        (functools.lru_cache(in_closure), functools.lru_cache(in_default)),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("capture", [in_closure, in_object])
def test_arrays_functions_classes_and_objects_are_covered(capture, value, other, capsys):
    assert digest(capture(value)) == digest(capture(value)) != digest(capture(other))
    assert capsys.readouterr().err == ""


FIRST, SECOND = lambda clean, denoised: clean, lambda clean, denoised: denoised


def test_two_lambdas_in_one_line_are_told_apart():
    assert digest(FIRST) != digest(SECOND)


@pytest.mark.slow
def test_digest_is_the_same_in_every_process():
    names = [function.__name__ for function in CAPTURES]
    value = {"a": [1, 2.5, None], "b": ({"x", "y", "z"}, "text")}
    code = (
        "import test_callables as t\n"
        f"for name in {names}: print(t.digest(getattr(t, name)({value!r})))\n"
        "print(t.digest(t.FIRST))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*(digest(function(value)) for function in CAPTURES), digest(FIRST)]


def recursive(clean, denoised):
    return recursive(denoised, clean)


def cyclic_list() -> list:
    items: list = [1]
    items.append(items)
    return items


def wraps_itself() -> Callable:
    def loss(clean, denoised):
        return 0

    loss.__wrapped__ = loss  # type: ignore[attr-defined]
    return loss


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)

    def __eq__(self, other):
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise ZeroDivisionError

    def __repr__(self):
        raise ZeroDivisionError

    def __call__(self, clean, denoised):
        return 0


def nested_list() -> list:
    items: list = []
    for _ in range(100_000):
        items = [items]
    return items


STRANGE = [
    *(
        len,
        max,
        print,
        dict.get,
        "a".join,
        [].append,
        operator.itemgetter(0),
        math.sin,
        np.add,
        str.upper,
        type,
        object,
    ),
    *(int, tf.reduce_mean, tf.function(recursive), recursive, in_closure(cyclic_list()), wraps_itself(), Hostile()),
    *(in_closure(Hostile()), in_default(nested_list()), functools.partial(functools.partial(max, 1), 2), Scaled),
    *(keras.losses.Huber(), keras.layers.Dense(1), lambda: 0, staticmethod(recursive), functools.cache(recursive)),
    *(types.SimpleNamespace, in_object(in_closure), eval("lambda x: x"), in_closure(sys), in_closure(plugins)),
    types.FunctionType((lambda clean, denoised: 0).__code__, {}),
]


@pytest.mark.parametrize("function", STRANGE, ids=lambda each: type(each).__name__)
def test_strange_callables_are_recorded(function):
    text, source = callables.record(function, "loss")
    assert plugins.is_recorded_callable(text)
    assert plugins.load({}, text, "--loss") is function
    assert isinstance(source, str)
    assert callables.record(function, "loss") == (text, source)


REFUSED = [max, operator.itemgetter(0), dict.get, object, functools.partial(max, 1), keras.losses.Huber()]


@pytest.mark.parametrize("function", REFUSED, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("argument", ["loss", "noise", "model", "metrics"])
def test_strange_callables_are_refused_in_one_line_before_anything_is_written(argument, function, tmp_path):
    given: dict[str, Any] = {argument: [function] if argument == "metrics" else function}
    with pytest.raises(UsageError) as caught:
        dae.train(replace(TINY, train_examples=64), tmp_path / "runs" / "run", **given)
    assert str(caught.value).startswith(f"--{argument}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Opaque:
    """An object whose state Python does not show."""

    __slots__ = ("value",)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (in_closure(Opaque()), "value (of the type Opaque)"),
        (in_closure([1, Opaque()]), "value[1] (of the type Opaque)"),
        (in_object(Opaque()), "Scaled.value (of the type Opaque)"),
        (in_default(tf.Variable(1.0)), "loss.defaults[0] (of the type ResourceVariable)"),
        (in_closure(keras.layers.Dense(1)), "value (of the type Dense)"),
    ],
)
def test_captured_values_that_cannot_be_recorded_are_named_in_one_warning(function, name, capsys):
    callables.record(function, "loss")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --loss: ")
    assert name in warning
    assert warning.count("\n") == 1


def test_function_without_source_is_told_apart_and_warned_of(capsys):
    functions = [eval(f"lambda clean, denoised: clean * {factor}") for factor in (2, 3)]
    (text, source), (other, _) = (callables.record(function, "loss") for function in functions)
    assert source == ""
    assert text != other
    assert capsys.readouterr().err.count("warning: --loss: lambda: no source code found") == 2


# Runs

SMALL = replace(TINY, train_examples=64, validation_examples=32, epochs=1)


def darker(clean, level, seed):
    return clean * (1 - level)


def largest(clean, denoised):
    return tf.reduce_max(tf.abs(clean - denoised), axis=[1, 2, 3])


def smallest(clean, denoised):
    return tf.reduce_min(tf.abs(clean - denoised), axis=[1, 2, 3])


def network(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")(noisy))


def quadratic(clean, denoised):
    return tf.reduce_mean((clean - denoised) ** 2, axis=[1, 2, 3])


def scaled(factor: float) -> Callable:
    def scaled_loss(clean, denoised):
        return factor * quadratic(clean, denoised)

    return scaled_loss


FUNCTIONS: Any = {"loss": scaled(1.0), "noise": darker, "model": network, "metrics": [largest, smallest]}


@pytest.fixture(scope="module")
def function_run(tmp_path_factory) -> Path:
    """A finished run with functions in every place."""
    folder = tmp_path_factory.mktemp("runs") / "functions"
    dae.train(SMALL, folder, **FUNCTIONS)
    return folder


def test_functions_are_used_recorded_and_kept(function_run):
    saved = json.loads((function_run / "config.json").read_text())
    for field in ("loss", "noise", "model"):
        assert saved[field].startswith(f"python:{FUNCTIONS[field].__name__}@")
    assert [text.partition("@")[0] for text in saved["metrics"]] == ["python:largest", "python:smallest"]
    names = {"scaled_loss", "darker", "network", "largest", "smallest"}
    assert {path.stem for path in (function_run / "code").iterdir()} == names
    assert (function_run / "code" / "darker.py").read_text().startswith("def darker(clean, level, seed):\n")
    (line,) = read_metrics(function_run)
    assert line["validation_loss"] == pytest.approx(line["validation_mse"], rel=1e-5)
    assert 0 <= line["validation_smallest"] < line["validation_largest"] <= 1
    assert len(dae.load_model(function_run).layers) == 2


def test_a_run_with_functions_is_resumed_with_the_same_and_no_others(function_run):
    def is_finished(**changes: Any) -> bool:
        return dae.train(SMALL, function_run, resume=True, **{**FUNCTIONS, **changes})["epoch"] == 1

    assert is_finished()
    assert is_finished(loss=scaled(1.0))
    others: Any = [{"loss": scaled(2.0)}, {"loss": largest}, {"noise": None}, {"model": largest}, {"metrics": []}]
    for changes in others:
        with pytest.raises(UsageError, match=rf"another run .*--{next(iter(changes))} was"):
            is_finished(**changes)


def test_the_configuration_of_a_run_resumes_it_only_after_its_functions_were_passed(function_run, monkeypatch):
    saved = config_module.read(function_run / "config.json")
    assert dae.train(saved, function_run, resume=True, **FUNCTIONS)["epoch"] == 1
    monkeypatch.setattr(plugins, "_REGISTERED", {})  # as in another process
    more = replace(saved, epochs=2)
    for argument, call in (
        ("noise", "noise=darker"),
        ("model", "model=network"),
        ("loss", "loss=scaled_loss"),
        ("metrics", r"metrics=\[largest\]"),
    ):
        message = rf"^--{argument}: \w+ was a Python function; pass it again: dae.train\(config, {call}\)$"
        with pytest.raises(UsageError, match=message):
            plugins.load({}, saved.metrics[0] if argument == "metrics" else getattr(saved, argument), f"--{argument}")
    done = run_in_process("run.py", "--run-dir", function_run, "--resume", "--epochs", more.epochs)
    assert done.returncode == 2
    assert "pass it again" in done.stderr
    assert done.stderr.count("\n") == 1


def without_seed(clean, level, seed):
    return clean + level * tf.random.normal(tf.shape(clean))


def of_another_shape(clean, level, seed):
    return clean[:, :5]


def failing(clean, level, seed):
    return clean + missing  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (without_seed, "a graph and eager mode"),
        (of_another_shape, "expected float32"),
        (failing, f"fails in line {failing.__code__.co_firstlineno + 1} .*missing"),
        (functools.partial(failing), "fails in line .*missing"),
    ],
)
def test_a_noise_function_is_checked_like_that_of_a_file(noise, reason, tmp_path):
    with pytest.raises(UsageError, match=rf"^--noise \w+: .*{reason}") as caught:
        dae.train(SMALL, tmp_path / "run", noise=noise)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["loss", "noise", "model"])
@pytest.mark.parametrize("value", ["bce", 3, [quadratic]])
def test_what_is_not_a_function_is_refused(argument, value, tmp_path):
    with pytest.raises(UsageError, match=rf"^--{argument}: expected a function.*RunConfig\({argument}="):
        dae.train(SMALL, tmp_path / "run", **{argument: value})


def test_a_model_in_place_of_its_function_is_refused(tmp_path):
    image = keras.Input((28, 28, 1))
    with pytest.raises(UsageError, match=r"^--model: expected a function .*, got a model$"):
        dae.train(SMALL, tmp_path / "run", model=keras.Model(image, keras.layers.ReLU()(image)))


@pytest.mark.parametrize("value", ["my.py:f", quadratic, [3], ["my.py:f"], 3])
def test_metrics_that_are_not_a_list_of_functions_are_refused(value, tmp_path):
    with pytest.raises(UsageError, match=r"^--metrics: expected "):
        dae.train(SMALL, tmp_path / "run", metrics=value)
