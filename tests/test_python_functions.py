"""Python functions in place of names: how they are recorded, found, kept with a run and checked."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import rejected, small_network
from runs import config_of

import dae
from dae import config as config_module
from dae import plugins
from dae.config import RunConfig
from dae.errors import UsageError
from dae.workdir.workdir import read_metrics, read_report


def record(function: object) -> str:
    return plugins.record(function, "loss")


def largest(clean, denoised):
    return tf.reduce_max(tf.abs(clean - denoised), axis=[1, 2, 3])


def smallest(clean, denoised):
    return tf.reduce_min(tf.abs(clean - denoised), axis=[1, 2, 3])


def scaled(factor: Any) -> Callable:
    def scaled_loss(clean, denoised):
        return factor * tf.reduce_mean((clean - denoised) ** 2, axis=[1, 2, 3])

    return scaled_loss


def with_default(factor: Any) -> Callable:
    def loss(clean, denoised, factor=factor):
        return factor * largest(clean, denoised)

    return loss


def as_partial(factor: Any) -> Callable:
    return functools.partial(with_default(0), factor=factor)


def as_layer(factor: Any) -> type:
    class Loss(keras.Layer):
        def __init__(self):
            super().__init__()

        def call(self, clean, denoised):
            return factor * largest(clean, denoised)

    return Loss


def decorated(factor: Any) -> Callable:
    @functools.wraps(largest)
    def wrapper(clean, denoised):
        return factor * largest(clean, denoised)

    return wrapper


def as_graph(factor: Any) -> Callable:
    return tf.function(scaled(factor))


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, clean, denoised):
        return self.factor * largest(clean, denoised)


def as_method(factor: Any) -> Callable:
    return Scaled(factor).loss


FIRST, SECOND = lambda clean, denoised: clean, lambda clean, denoised: denoised
PLAIN: list[Any] = [largest, tf.function(smallest), FIRST, SECOND, with_default(2), with_default(3), keras.layers.ReLU]


def test_functions_without_captured_values_are_recorded_by_their_code_without_a_warning(capsys):
    texts = [record(function) for function in PLAIN]
    assert len(set(texts)) == len(PLAIN)
    assert texts[0].startswith("python:largest@")
    assert texts == [record(function) for function in PLAIN]
    assert texts[4] == record(with_default(2))  # the same function, defined again
    assert [plugins.load({}, text, "--loss") for text in texts[:4]] == PLAIN[:4]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", [scaled, with_default, as_partial, as_layer, decorated, as_graph, as_method])
def test_functions_that_capture_other_values_are_never_confused_and_warned_of_once(form, capsys):
    functions = [form(np.ones(2)) for _ in range(3)]
    texts = [record(function) for function in functions]
    assert len(set(texts)) == 3
    assert texts == [record(function) for function in functions]
    assert [plugins.load({}, text, "--loss") for text in texts] == functions
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert all(line.startswith("warning: --loss: ") and "a resume cannot check" in line for line in warnings)


@pytest.mark.slow
def test_the_texts_are_the_same_in_every_process():
    code = "import test_python_functions as tests\nprint(*map(tests.record, tests.PLAIN))"
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [record(function) for function in PLAIN]


def test_sources_have_unique_names_and_a_function_without_source_is_told_apart_by_its_bytecode():
    made = [eval(f"lambda clean, denoised: clean * {factor}") for factor in (2, 3)]
    assert len({record(function) for function in made}) == 2
    texts = [record(largest), record(scaled(1)), record(made[0]), record(scaled(2)), "bce"]
    found = plugins.sources([*texts, "python:largest@" + "0" * 64])
    # A process that began with `python -c`, such as that of this test, has other source code in "<string>".
    assert list(found) == ["largest.py", "scaled_loss.py", "scaled_loss-2.py"]
    assert found["largest.py"].startswith("def largest(clean, denoised):\n")


@pytest.mark.parametrize(
    "value", ["bce", 3, [largest], None, len, np.add, "a".join, object], ids=lambda value: type(value).__name__
)
def test_what_is_not_written_in_python_is_rejected(value):
    with rejected("--loss: expected a function or class written in Python, got "):
        record(value)


# Runs


@pytest.fixture
def function_run(finished_run, tmp_path) -> Path:
    """A finished run with a function in every field that takes one."""
    return Path(shutil.copytree(finished_run("functions"), tmp_path / "run"))


def test_functions_are_used_recorded_and_kept(function_run, files):
    saved = config_module.read(function_run / "config.json")
    assert saved == config_of(files, "functions")
    assert saved.noise.startswith("python:darker@")
    names = {"squared_error", "darker", "small_network", "smallest_error"}
    assert {path.stem for path in (function_run / "code").iterdir()} == names
    for line in read_metrics(function_run):
        assert line["validation_loss"] == pytest.approx(line["validation_mse"], rel=1e-5)
        assert 0 <= line["train_smallest_error"] < 1
        assert 0 <= line["validation_smallest_error"] < 1
    assert 0 <= read_report(function_run)["test_smallest_error"] < 1


def test_a_run_with_functions_is_resumed_with_the_same_and_no_others(function_run, files, monkeypatch):
    def resume(**changes: Any) -> dict[str, float]:
        return dae.train(config_of(files, "functions", **changes), function_run, resume=True, quiet=True)

    assert resume()["epochs"] == 2
    others: Any = [{"loss": scaled(2.0)}, {"loss": largest}, {"noise": "gaussian"}, {"model": largest}, {"metrics": ()}]
    for changes in others:
        with pytest.raises(UsageError, match=rf"another run .*--{next(iter(changes))} was"):
            resume(**changes)
    saved = config_module.read(function_run / "config.json")
    monkeypatch.setattr(plugins, "_RECORDED", {})  # as in another process
    with pytest.raises(UsageError, match=r"^--noise: darker was a Python function; pass it again from Python$"):
        plugins.load({}, saved.noise, "--noise")


def failing(clean, level, seed):
    return clean + missing  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize(
    ("field", "function", "message"),
    [
        ("noise", failing, rf"--noise failing: fails in line {failing.__code__.co_firstlineno + 1} .*missing"),
        ("noise", lambda clean, level, seed: clean + tf.random.normal([28, 28, 1]), "a graph and eager mode"),
        ("model", small_network((28, 28, 1)), "--model: expected a function or class .*, got <Functional"),
        ("loss", keras.losses.Huber(), "--loss: expected a function or class .*, got <LossFunctionWrapper"),
        ("metrics", largest, "--metrics: expected "),
        ("metrics", [3], "--metrics: expected "),
    ],
)
def test_a_function_that_cannot_be_used_is_rejected_in_one_line_before_anything_is_written(
    field, function, message, tmp_path
):
    with rejected(f"--{field}", match=message):
        dae.train(RunConfig(train_examples=64, **{field: function}), tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []
