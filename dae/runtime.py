"""The machine that a run is on: the settings of it that decide a result's last bits, and its description."""

import dataclasses
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port

from dae.config import RunConfig
from dae.errors import UsageError

# The fewest images of a micro-batch: a guess at where starting operations costs more than further cores save. It
# matters on machines with more than eight cores only, and none was at hand.
SMALLEST_PART = 16


def settle(config: RunConfig) -> RunConfig:
    """`config` with its micro-batches, threads and oneDNN filled in where they were left to the machine, and in force.

    The same bits then come out on a machine with another number of cores. Threads and oneDNN can be set before
    TensorFlow starts only: warns where it has started with slower ones than dae would have chosen, and raises
    UsageError where `config` names others.
    """
    # Python's only word for what is in force: TensorFlow decides by processor unless the environment says so.
    onednn = bool(_pywrap_util_port.IsMklEnabled())
    if config.onednn not in (None, onednn):
        raise UsageError(
            f"--onednn: is {config.onednn}, but TensorFlow was started with {onednn}; "
            f"set TF_ENABLE_ONEDNN_OPTS={int(bool(config.onednn))}"
        )
    if not onednn and config.onednn is None and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0":
        _warn("without oneDNN")
    gpu = bool(tf.config.list_physical_devices("GPU"))
    parts = config.micro_batches or max(1, min(1 if gpu else cores(), config.batch_size // SMALLEST_PART))
    wanted = config.intra_op_threads or max(1, cores() // parts)
    chosen = tf.config.threading.get_intra_op_parallelism_threads()  # 0 unless dae or its user has set them
    threads = chosen or cores()
    if wanted != threads:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(wanted)
            threads = wanted
        except RuntimeError:
            if config.intra_op_threads is not None:
                raise UsageError(
                    f"--intra-op-threads: is {wanted}, but TensorFlow was started with {threads} in this process"
                ) from None
            if not chosen:
                _warn(f"with intra_op_threads={threads} instead of {wanted}")
    return dataclasses.replace(config, onednn=onednn, micro_batches=parts, intra_op_threads=threads)


def _warn(how: str) -> None:
    warnings.warn(f"TensorFlow was started {how}, which is slower; import dae before it", stacklevel=4)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """What beside the configuration made a result: versions, source, command line and machine."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dae", "tensorflow", "keras", "numpy")},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": _git("status", "--porcelain", "--untracked-files=no", read=str.splitlines),
        "command": [sys.executable, *sys.argv],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": cores(),
        "gpus": [device.name for device in tf.config.list_physical_devices("GPU")],
    }


def _git(*arguments: str, read: Callable[[str], Any] = str.strip) -> Any:
    """What git says of the checkout that holds the running script; None where there is no git or no checkout."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read(done.stdout) if done.returncode == 0 else None


def _cpu_name() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
