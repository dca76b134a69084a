import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("before", "warns"), [("import tensorflow; tensorflow.constant(1) + 1", True), ("pass", False)]
)
def test_a_tensorflow_that_was_started_before_with_slower_settings_is_warned_of(before, warns):
    script = f"""
import os
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
{before}
del os.environ["TF_ENABLE_ONEDNN_OPTS"]
import dae
from dae import runtime
print(runtime.settle(dae.RunConfig()))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("TensorFlow was started without oneDNN" in done.stderr) == warns
    assert f"onednn={not warns}" in done.stdout


def test_cores_become_micro_batches_and_small_batches_stay_whole():
    script = """
import dae
from dae import runtime
for size in (128, 20):
    print(runtime.settle(dae.RunConfig(batch_size=size, intra_op_threads=1)).micro_batches)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0))
    assert done.stdout.split() == [str(min(cores, 8)), "1"], done.stderr
