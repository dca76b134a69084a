"""Runtime settings that decide the last bits of a result: shards, threads and oneDNN."""

import dataclasses
import os
import warnings

import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port

from dae.config import RunConfig
from dae.errors import UsageError

# A shard has at least this many images, because starting the operations of a smaller one is expected to cost more than
# another core saves. At the default batch size, this matters only with more than eight cores, where it was not
# measured.
MIN_SHARD_SIZE = 16


def resolve(config: RunConfig, whole_batches: bool = False) -> RunConfig:
    """Return `config` with the runtime settings that are None filled in, and set TensorFlow's number of threads.

    With `whole_batches`, batches are not split unless `config` says so.

    When the filled-in settings are recorded, they give the same bits on a machine with another number of cores. Threads
    and oneDNN can be set only before TensorFlow starts. If it has started, this function warns if its settings are
    slower than those that dae would choose, and raises UsageError if `config` requires other settings.
    """
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    parallel = 1 if on_gpu or whole_batches else cores()
    shards = config.shards or max(1, min(parallel, config.batch_size // MIN_SHARD_SIZE))
    return dataclasses.replace(
        config,
        onednn=_resolve_onednn(config.onednn),
        shards=shards,
        intra_op_threads=_resolve_threads(config.intra_op_threads, max(1, cores() // shards)),
    )


def _resolve_onednn(requested: bool | None) -> bool:
    # This function is private, but there is no public one: TensorFlow decides by the processor, unless an environment
    # variable is set.
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
    warnings.warn(
        f"TensorFlow was started {how}, which is slower; import dae and train before any other use of it", stacklevel=5
    )


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
