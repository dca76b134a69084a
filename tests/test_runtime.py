"""Threads, shards and oneDNN of the machine; and settings of Keras and variables, which do not change a run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, run_subprocess

import dae
from dae import machine, runtime
from dae.config import PYTHON_DATA, RunConfig, to_json
from dae.errors import UsageError
from dae.training import trainer
from dae.training.task import prepare


@pytest.fixture
def threads() -> int:
    """The threads that TensorFlow was started with."""
    tf.constant(1) + 1
    return tf.config.threading.get_intra_op_parallelism_threads() or runtime.cores()


@pytest.mark.slow
def test_resolve_warns_if_tensorflow_was_started_without_onednn():
    script = """
import os
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
import tensorflow; tensorflow.constant(1) + 1
del os.environ["TF_ENABLE_ONEDNN_OPTS"]
import dae
from dae import runtime
print(runtime.resolve(dae.RunConfig()))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "oneDNN" in done.stderr
    assert done.stdout.strip().endswith(", False)")


def test_resolve_returns_what_tensorflow_was_started_with(threads):
    """Warnings are errors here, so this also tests that resolve does not warn."""
    shards, intra_op_threads, onednn = runtime.resolve(replace(TINY, intra_op_threads=threads))
    assert (intra_op_threads, onednn) == (threads, os.environ["TF_ENABLE_ONEDNN_OPTS"] != "0")
    assert runtime.resolve(TINY) == (shards, threads, onednn)
    again = replace(TINY, shards=shards, intra_op_threads=threads, onednn=onednn)
    assert runtime.resolve(again) == (shards, threads, onednn)


def test_settings_of_the_configuration_come_before_those_of_an_earlier_run(threads):
    *_, onednn = runtime.resolve(replace(TINY, intra_op_threads=threads))
    recorded = replace(RESOLVED, shards=5, intra_op_threads=threads, onednn=onednn)
    assert runtime.resolve(TINY, recorded=recorded) == (5, threads, onednn)
    assert runtime.resolve(replace(TINY, shards=3), recorded=recorded) == (3, threads, onednn)
    other = replace(recorded, onednn=not onednn)
    with pytest.raises(UsageError, match=f"--onednn: .*TF_ENABLE_ONEDNN_OPTS={int(not onednn)}"):
        runtime.resolve(TINY, recorded=other)
    assert runtime.resolve(replace(TINY, onednn=onednn), recorded=other) == (5, threads, onednn)


RESOLVED = replace(helpers.RESOLVED, shards=2)
# These tests are of machines without a GPU; on others, `nvidia-smi` and TensorFlow rightly report one.
without_gpu = pytest.mark.skipif(
    bool(tf.config.list_physical_devices("GPU")) or any(Path("/dev").glob("nvidia[0-9]*")),
    reason="checks the messages on a machine without a GPU",
)


def test_describe_names_the_processor_and_its_settings():
    line = runtime.describe(RESOLVED)
    assert line.startswith(f"computing on {runtime.cpu_name()}, ")
    assert f"{runtime.cores()} core" in line
    assert ": 2 shards, 1 thread each, oneDNN on; " in line
    changed = replace(RESOLVED, shards=1, intra_op_threads=3, onednn=False)
    assert ": 1 shard, 3 threads each, oneDNN off; " in runtime.describe(changed)
    assert "\n" not in line


@without_gpu
def test_describe_tells_a_gpu_that_tensorflow_cannot_use_from_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runtime.describe(RESOLVED).endswith("; no GPU")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "a GPU is present, but TensorFlow cannot use it" in runtime.describe(RESOLVED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "hidden by CUDA_VISIBLE_DEVICES=-1" in runtime.describe(RESOLVED)


def test_resolve_makes_a_shard_for_each_core_but_none_below_16_images(threads):
    def shards(batch_size: int) -> int:
        return runtime.resolve(replace(TINY, batch_size=batch_size, intra_op_threads=threads))[0]

    cores = os.sched_getaffinity(0)
    assert shards(128) == min(len(cores), 8)
    assert shards(20) == shards(1) == 1
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert shards(128) == 1
    finally:
        os.sched_setaffinity(0, cores)


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
    run_subprocess("run.py", "--config", tmp_path / "config.json", "--run-dir", "run", cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_bce"] == pytest.approx(expected[0]["test_bce"], rel=1e-5)


@pytest.mark.slow
def test_a_keras_json_that_keras_rejects_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text(json.dumps({"floatx": "float7"}))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    done = run_subprocess("run.py", "--run-dir", "run", cwd=tmp_path, status=2)
    assert done.stderr.count("\n") == 1
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
