"""Settings outside a run's configuration: Keras's, which runs do not use, and variables, which they record."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import run_subprocess

import dae
from dae import machine
from dae.config import PYTHON_DATA, RunConfig, to_json
from dae.errors import UsageError
from dae.training import trainer
from dae.training.task import prepare

DIAGONAL = 255 * np.eye(16, dtype=np.uint8)
IMAGES = {"x_train": np.tile(DIAGONAL, (48, 1, 1)), "x_test": DIAGONAL[None]}
QUICK = RunConfig(batch_size=16, validation_examples=16, epochs=1, bce_steps=0)


@pytest.fixture
def other_settings() -> Iterator[None]:
    before = machine.set_keras("float64", 0.1, "channels_first", "mixed_float16")
    yield
    machine.set_keras(*before)


def settings() -> tuple[str, float, str, str]:
    config = keras.config
    return config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy().name


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[dict[str, float], np.ndarray]:
    run = tmp_path_factory.mktemp("expected")
    return trainer.train(QUICK, run, data=IMAGES, quiet=True), dae.denoise(np.eye(16, dtype=np.float32), run)


@pytest.mark.slow
def test_settings_of_keras_do_not_change_a_run_and_are_left_as_they_were(other_settings, expected, tmp_path):
    report = trainer.train(QUICK, tmp_path, data=IMAGES, quiet=True)
    denoised = dae.denoise(np.eye(16, dtype=np.float32), tmp_path)
    assert report == expected[0]
    np.testing.assert_array_equal(denoised, expected[1])
    assert settings() == ("float64", 0.1, "channels_first", "mixed_float16")


def test_settings_of_keras_are_left_as_they_were_after_a_mistake(other_settings, tmp_path):
    with pytest.raises(UsageError, match="no such run or model file"):
        dae.load_model(tmp_path / "none")
    assert settings() == ("float64", 0.1, "channels_first", "mixed_float16")


def test_a_variable_that_changes_numbers_is_recorded_and_a_resume_without_it_is_rejected(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("XLA_FLAGS", "")  # as if it were not set
    config = replace(QUICK, data=PYTHON_DATA)
    recorded = prepare(config, IMAGES).resolved
    assert recorded.variables == "ONEDNN_MAX_CPU_ISA=AVX2"
    assert prepare(config, IMAGES, recorded=recorded).resolved == recorded
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    with pytest.raises(UsageError, match=r"^environment: the run was made with ONEDNN_MAX_CPU_ISA=AVX2, now there is"):
        prepare(config, IMAGES, recorded=recorded)


def test_functions_that_run_eagerly_are_rejected(tmp_path):
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(UsageError, match=r"^tf.config.run_functions_eagerly: is on"):
            trainer.train(QUICK, tmp_path / "run")
    finally:
        tf.config.run_functions_eagerly(False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scripts_run_whatever_keras_json_and_the_variable_for_its_legacy_version_say(expected, tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text(json.dumps({"floatx": "float64", "image_data_format": "channels_first"}))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    np.savez(tmp_path / "images.npz", x_train=IMAGES["x_train"], x_test=IMAGES["x_test"])
    (tmp_path / "config.json").write_text(to_json(replace(QUICK, data=str(tmp_path / "images.npz"))))
    done = run_subprocess("run.py", "--config", tmp_path / "config.json", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_bce"] == pytest.approx(expected[0]["test_bce"], rel=1e-5)


@pytest.mark.slow
def test_a_keras_json_that_keras_rejects_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text(json.dumps({"floatx": "float7"}))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    done = run_subprocess("run.py", "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "keras.json" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_path_that_tensorflow_would_not_find_is_rejected_in_one_line(tmp_path):
    script = "import dae; dae.train(dae.RunConfig(), 'r\\udcc3\\udcbcn')"
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "a path that is not UTF-8 to Python; set PYTHONUTF8=1" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
