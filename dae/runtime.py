"""Devices, shards, threads and oneDNN, which decide the last bits of a result."""

import math
import os
import platform
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

# A private module, since no public one says whether TensorFlow uses oneDNN: that depends on the processor, unless an
# environment variable is set. setup.cfg admits a single minor version of TensorFlow.
from tensorflow.python.util import _pywrap_util_port

from dae.config import RunConfig
from dae.errors import UsageError, listed
from dae.replicas import ALONE, Replicas
from dae.resolved import Resolved

# A shard has at least this many pixel values, those of 16 MNIST images, because starting the operations of a smaller
# one is expected to cost more than another core saves. With 16 patches of 64 x 64 on two cores, two shards take 0.89 of
# the time of one.
MIN_SHARD_VALUES = 16 * 28 * 28


def select_devices(names: Sequence[str] = ()) -> tuple[str, ...]:
    """Make TensorFlow use the devices with these names, such as gpu:1 or cpu, by default all GPUs or else the CPU.

    Returns TensorFlow's names for them. Raises UsageError for a device that does not exist, or if TensorFlow has
    started without it.
    """
    (cpu,), visible = tf.config.list_physical_devices("CPU"), tf.config.get_visible_devices("GPU")
    # The processor is one device unless it has been divided, as for tests.
    cpus = tf.config.get_logical_device_configuration(cpu) or [cpu]
    known = {f"gpu:{number}": gpu for number, gpu in enumerate(tf.config.list_physical_devices("GPU"))}
    known |= {f"cpu:{number}": None for number in range(len(cpus))}
    chosen = [name if ":" in name else f"{name}:0" for name in map(str.lower, names)]
    chosen = chosen or [name for name, gpu in known.items() if gpu in visible] or ["cpu:0"]
    if not {*chosen} <= {*known} or len({name[:3] for name in chosen}) > 1 or len({*chosen}) < len(chosen):
        raise UsageError(f"--devices: expected some of {listed(known)}, each once, of one kind, got {' '.join(names)}")
    gpus = [known[name] for name in chosen if known[name] is not None]
    try:
        if gpus != visible:
            tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)  # so that other processes can use the GPU too
    except (RuntimeError, ValueError):  # TensorFlow has started, or the user has divided a GPU
        if gpus != tf.config.get_visible_devices("GPU"):
            raise UsageError(
                f"--devices: {' '.join(chosen)} cannot be set, because TensorFlow has started; train in a new process"
            ) from None
    return tuple(f"GPU:{number}" for number in range(len(gpus))) or tuple(map(str.upper, chosen))


def resolve(
    config: RunConfig,
    whole_batches: bool = False,
    replicas: Replicas = ALONE,
    recorded: Resolved | None = None,
    image_shape: tuple[int, int, int] = (28, 28, 1),
) -> tuple[int, int, bool]:
    """Return the number of shards and of threads, and whether to use oneDNN; and set the number of threads.

    A setting of `config` comes first, then that of `recorded`, an earlier run that is resumed or repeated. By default,
    batches of images of `image_shape` are divided among the workers and devices of `replicas`, and for speed among the
    cores; but with `whole_batches` not among the cores.

    Threads and oneDNN can be set only before TensorFlow starts. If it has started, this function warns if its settings
    are slower than the default, and raises UsageError if `config` or `recorded` requires other settings.
    """
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    devices, workers = max(1, len(replicas.devices)), replicas.workers
    parallel = devices if on_gpu or whole_batches else max(devices, cores())
    images = config.batch_size // workers
    per_worker = max(1, min(parallel, images, images * math.prod(image_shape) // MIN_SHARD_VALUES))
    if workers > 1:
        per_worker = 2 ** (per_worker.bit_length() - 1)
    shards = config.shards or (recorded.shards if recorded else workers * per_worker)
    threads = config.intra_op_threads or (recorded.intra_op_threads if recorded else None)
    onednn = config.onednn if config.onednn is not None or recorded is None else recorded.onednn
    # It would change the order of additions in a graph of several shards, depending on how many there are.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    if on_gpu and config.deterministic:
        tf.config.experimental.enable_op_determinism()
    default_threads = max(1, cores() // max(1, shards // workers))
    return shards, _resolve_threads(threads, default_threads), _resolve_onednn(onednn)


def _resolve_onednn(requested: bool | None) -> bool:
    enabled = bool(_pywrap_util_port.IsMklEnabled())
    if requested not in (None, enabled):
        raise UsageError(
            f"--onednn: {requested} cannot be set, because TensorFlow was started with {enabled}; "
            f"set TF_ENABLE_ONEDNN_OPTS={int(bool(requested))} before TensorFlow is imported"
        )
    if not enabled and requested is None and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0":
        _warn("without oneDNN")
    return enabled


def _resolve_threads(requested: int | None, default: int) -> int:
    wanted = requested or default
    configured = tf.config.threading.get_intra_op_parallelism_threads()  # 0 means TensorFlow's default, one per core
    current = configured or cores()
    if wanted == current:
        return current
    try:
        tf.config.threading.set_intra_op_parallelism_threads(wanted)
        return wanted
    except RuntimeError:  # TensorFlow has started
        if requested is not None:
            raise UsageError(
                f"--intra-op-threads: {wanted} cannot be set, because TensorFlow was started with {current}; "
                "train in a new process"
            ) from None
        if not configured:
            _warn(f"with intra_op_threads={current} instead of {wanted}")
        return current


def _warn(how: str) -> None:
    warnings.warn(f"TensorFlow was started {how}, which is slower; import dae before any other use of it", stacklevel=5)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(resolved: Resolved, replicas: Replicas = ALONE) -> str:
    """Return, in one line, the processor, settings, GPUs and workers that a run computes on."""
    parts = [
        f"{cpu_name() or 'a processor'}, {_number(cores(), 'core')}: {_number(resolved.shards, 'shard')}, "
        f"{_number(resolved.intra_op_threads, 'thread')} each, oneDNN {'on' if resolved.onednn else 'off'}"
    ]
    for gpu in tf.config.get_visible_devices("GPU"):
        parts.append(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name))
    if len(parts) == 1:
        parts.append(("" if tf.config.list_physical_devices("GPU") else _unused_gpu()) or "no GPU")
    if (used := min(len(replicas.devices), len(replicas.own_shards))) > 1:
        parts.append(f"on {used} devices")
    if replicas.workers > 1:
        parts.append(f"with {replicas.workers} workers")
    return f"computing on {'; '.join(parts)}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _unused_gpu() -> str:
    """Return a remark on an NVIDIA GPU that TensorFlow does not list, or an empty string if there is none."""
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        return f"GPUs are hidden by CUDA_VISIBLE_DEVICES={hidden}"
    # There is no such device in WSL, but the command.
    present = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    return "a GPU is present, but TensorFlow cannot use it (pip install 'tensorflow[and-cuda]')" if present else ""


def cpu_name() -> str:
    """Return the processor's name: on Linux from /proc/cpuinfo, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
