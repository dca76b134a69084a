import os
import subprocess
import sys
from dataclasses import replace

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
    assert "onednn=False" in done.stdout


def test_resolve_records_what_tensorflow_was_started_with(threads):
    """Warnings are errors here, so this also tests that resolve does not warn."""
    resolved = runtime.resolve(replace(TINY, intra_op_threads=threads))
    assert resolved.onednn == (os.environ["TF_ENABLE_ONEDNN_OPTS"] != "0")
    assert resolved.intra_op_threads == threads
    assert runtime.resolve(resolved) == resolved


def test_resolve_refuses_settings_that_tensorflow_was_not_started_with(threads):
    onednn = runtime.resolve(replace(TINY, intra_op_threads=threads)).onednn
    with pytest.raises(UsageError, match=f"--onednn: .*TF_ENABLE_ONEDNN_OPTS={int(not onednn)}"):
        runtime.resolve(replace(TINY, intra_op_threads=threads, onednn=not onednn))
    with pytest.raises(UsageError, match=rf"--intra-op-threads: .*\b{threads + 1}\b.*\b{threads}\b"):
        runtime.resolve(replace(TINY, intra_op_threads=threads + 1))


def test_resolve_makes_a_shard_for_each_core_but_none_below_16_images(threads):
    def shards(batch_size: int) -> int | None:
        return runtime.resolve(replace(TINY, batch_size=batch_size, intra_op_threads=threads)).shards

    cores = os.sched_getaffinity(0)
    assert shards(128) == min(len(cores), 8)
    assert shards(20) == shards(1) == 1
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert shards(128) == 1
    finally:
        os.sched_setaffinity(0, cores)
