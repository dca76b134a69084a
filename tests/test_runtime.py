import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import tensorflow as tf
from helpers import TINY

from dae import runtime
from dae.errors import UsageError


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


@pytest.mark.slow
def test_other_threads_than_before_in_one_process_are_rejected_in_one_line_and_defaults_kept():
    script = """
import dae
from dae import runtime
runtime.resolve(dae.RunConfig(shards=1, intra_op_threads=1))
import tensorflow; tensorflow.constant(1) + 1
print(runtime.resolve(dae.RunConfig(shards=2))[1])
for threads in (1, 2):
    try:
        print(runtime.resolve(dae.RunConfig(shards=1, intra_op_threads=threads))[1])
    except dae.UsageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = "--intra-op-threads: 2 cannot be set, because TensorFlow was started with 1; train in a new process"
    assert done.stdout.splitlines() == ["1", "1", expected], done.stderr
    assert "Warning" not in done.stderr


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
