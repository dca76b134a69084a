"""Settings of Keras and of the machine, outside a run's configuration, that change numbers."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from dae.errors import UsageError

# Variables that select other kernels, fusions, precisions or instructions in TensorFlow, XLA, oneDNN or cuDNN; found
# among the names in TensorFlow's libraries. TF_ENABLE_ONEDNN_OPTS is the setting `onednn`.
_VARIABLES = (
    *("TF_XLA_FLAGS", "XLA_FLAGS", "TF_JITRT_FLAGS", "TF_NUM_INTRAOP_THREADS", "TF_OVERRIDE_GLOBAL_THREADPOOL"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "ONEDNN_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE"),
    *("DNNL_MAX_CPU_ISA", "DNNL_CPU_ISA_HINTS", "DNNL_DEFAULT_FPMATH_MODE", "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS"),
    *("TF_ENABLE_ONEDNN_SPMM", "TF_ENABLE_ZENDNN_OPTS", "TF_USE_EIGEN_PARALLEL_FOR_IN_WORK_SHARDER"),
    *("TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_LEVEL", "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_IGNORE_PERFORMANCE"),
    *("TF_USE_DEEP_CONV2D", "TF_ENABLE_FFT_TILING_FORWARD", "TF_ENABLE_WINOGRAD_NONFUSED", "TF_ENABLE_MAXPOOL_NANPROP"),
    *("TF_DETERMINISTIC_OPS", "TF_CUDNN_DETERMINISTIC", "TF_CUDNN_USE_AUTOTUNE", "TF_USE_DEFAULT_CONV_ALGO"),
    *("TF_CUDNN_USE_RUNTIME_FUSION", "TF_USE_CUDNN_BATCHNORM_SPATIAL_PERSISTENT", "TF_USE_CUBLASLT"),
    *("TF_CONV2D_USE_FP16_ACCUMULATE", "TF_FP16_CONV_USE_FP32_COMPUTE", "TF_FP16_MATMUL_USE_FP32_COMPUTE"),
    *("TF_MATMUL_AUTOTUNE_ENABLE", "TF_DISABLE_JIT_KERNELS", "NVIDIA_TF32_OVERRIDE"),
)


def variables() -> str:
    """Return the environment variables that change numbers and are set, as `NAME=value`, separated by spaces."""
    return " ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name))


def check_tensorflow() -> None:
    """Raise UsageError if this process has changed how TensorFlow computes functions."""
    for name, is_set in (
        ("run_functions_eagerly", tf.config.functions_run_eagerly()),
        ("optimizer.set_jit", tf.config.optimizer.get_jit()),
    ):
        if is_set:
            raise UsageError(f"tf.config.{name}: is on, which changes the results; turn it off")


def set_keras(
    floatx: str = "float32", epsilon: float = 1e-7, data_format: str = "channels_last", policy: Any = "float32"
) -> tuple[str, float, str, Any]:
    """Set what keras.json and a notebook's calls can change; the defaults are those of Keras, with which runs compute.

    Returns the values before.
    """
    config = keras.config
    before = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    config.set_floatx(floatx)
    config.set_epsilon(epsilon)
    config.set_image_data_format(data_format)
    config.set_dtype_policy(policy)
    return before


@contextlib.contextmanager
def keras_defaults() -> Iterator[None]:
    """Use Keras's own default settings in the block, and restore the caller's at its end."""
    before = set_keras()
    try:
        yield
    finally:
        set_keras(*before)
