"""Denoising autoencoders in TensorFlow, with a training loop that is short enough to read in one sitting.

    import dae
    report = dae.train(dae.preset("good"), "runs/first")

Importing the package is quick: TensorFlow is imported when the first function that needs it is used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from dae import startup
from dae.config import RunConfig, preset
from dae.errors import Interrupted, RunError, UsageError

startup.check_backend()
# TensorFlow reads these when it is imported, so they are set here; values set by the user take precedence.
# oneDNN more than halves the time of a training step, and TensorFlow turns it off on some processors.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The train step is a tf.function, which no other backend of Keras can run.
os.environ["KERAS_BACKEND"] = "tensorflow"

__version__ = "0.3.0"
__all__ = [
    "Interrupted",
    "RunConfig",
    "RunError",
    "UsageError",
    "denoise",
    "estimate_noise",
    "load_model",
    "preset",
    "train",
]

# Functions that are imported when they are used; all but the estimate of noise need TensorFlow.
_LAZY_IMPORTS = {
    "denoise": "dae.inference.denoise",
    "estimate_noise": "dae.data.noise_level",
    "load_model": "dae.workdir.model_files",
    "train": "dae.training.trainer",
}

if TYPE_CHECKING:
    from dae.data.noise_level import estimate_noise
    from dae.inference.denoise import denoise
    from dae.training.trainer import train
    from dae.workdir.model_files import load_model


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'dae' has no attribute {name!r}")
    if name != "estimate_noise":
        startup.import_tensorflow()
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
