"""Runtime settings that decide the last bits of a result: shards, threads and oneDNN."""

import dataclasses
import os
import warnings

import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port

from dae.config import RunConfig
from dae.errors import UsageError

# Below this, starting the operations of one more shard costs more than another core saves. It matters on machines with
# more than eight cores only; it was not measured on one.
MIN_SHARD_SIZE = 16


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the runtime settings that `config` leaves open, and apply them to TensorFlow.

    The recorded settings then give the same bits on a machine with another number of cores. Threads and oneDNN can be
    set only before TensorFlow starts: warns if it has started with slower ones than dae would choose, and raises
    UsageError if `config` names others.
    """
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    shards = config.shards or max(1, min(1 if on_gpu else cores(), config.batch_size // MIN_SHARD_SIZE))
    return dataclasses.replace(
        config,
        onednn=_resolve_onednn(config.onednn),
        shards=shards,
        intra_op_threads=_resolve_threads(config.intra_op_threads, max(1, cores() // shards)),
    )


def _resolve_onednn(requested: bool | None) -> bool:
    # Private, but the only way to ask: TensorFlow decides by processor unless the environment says otherwise.
    enabled = bool(_pywrap_util_port.IsMklEnabled())
    if requested not in (None, enabled):
        raise UsageError(
            f"--onednn: expected {requested}, but TensorFlow was started with {enabled}; "
            f"set TF_ENABLE_ONEDNN_OPTS={int(bool(requested))}"
        )
    if not enabled and requested is None and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0":
        _warn("without oneDNN")
    return enabled


def _resolve_threads(requested: int | None, default: int) -> int:
    wanted = requested or default
    configured = tf.config.threading.get_intra_op_parallelism_threads()  # 0: TensorFlow's default, one per core
    current = configured or cores()
    if wanted == current:
        return current
    try:
        tf.config.threading.set_intra_op_parallelism_threads(wanted)
        return wanted
    except RuntimeError:  # TensorFlow has started
        if requested is not None:
            raise UsageError(
                f"--intra-op-threads: expected {wanted}, but TensorFlow was started with {current} in this process"
            ) from None
        if not configured:
            _warn(f"with intra_op_threads={current} instead of {wanted}")
        return current


def _warn(how: str) -> None:
    warnings.warn(f"TensorFlow was started {how}, which is slower; import dae before it", stacklevel=5)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
