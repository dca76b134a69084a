"""Model files: a run's model.keras and model.h5, or any other file of those formats."""

import logging
import re
from pathlib import Path
from textwrap import shorten

import keras

from dae.errors import UsageError, shown
from dae.files import atomic_path
from dae.machine import keras_defaults
from dae.workdir import hdf5_check
from dae.workdir.workdir import REPORT, read_report

MODEL_FILES = ("model.keras", "model.h5")


@keras_defaults()
def load_model(path: str | Path) -> keras.Model:
    """Load the model of a finished run's folder, or of a .keras or .h5 file.

    It takes and returns float32 [N, H, W, C] in [0, 1]. The file need not be trusted: Keras runs no code from it (safe
    mode), and memory is bounded by the file's size (docs/reproducibility.md). Raises UsageError if there is no such
    model.
    """
    path = Path(path)
    if path.is_dir():
        read_report(path)
        path = path / MODEL_FILES[0]
        if not path.is_file():
            raise UsageError(f"{path}: no such file; delete {REPORT}, and repeat run.py with --resume to write it")
    if not path.exists():
        raise UsageError(f"{path}: no such run's folder or model file")
    if path.suffix not in (".keras", ".h5") or not path.is_file():
        raise UsageError(f"{path}: expected a run's folder, or a .keras or .h5 file")
    try:
        hdf5_check.check(path)
        # First only the shapes of the weights: a few bytes can claim a layer of terabytes.
        with keras.StatelessScope(initialize_variables=False):
            weights = keras.models.load_model(path, compile=False).count_params()
        if weights > path.stat().st_size:
            raise UsageError(f"{path}: claims {weights:,} weights, more than it has bytes")
        model = keras.models.load_model(path, compile=False)
    except UsageError:
        raise
    except Exception as error:  # Keras, h5py and zipfile raise many types
        raise UsageError(f"{path}: not a readable model ({_reason(error)})") from None
    names_output = isinstance(getattr(model, "output", None), dict)
    if names_output or len(model.input_shape) != 4 or model.input_shape != model.output_shape:
        shapes = f"{shown(model.input_shape)} to {shown(model.output_shape)}"
        raise UsageError(f"{path}: expected a model from images to images of the same shape, got one from {shapes}")
    return model


def _reason(error: Exception) -> str:
    """Return why a model cannot be loaded, in a line of at most 200 characters, from Keras's long message."""
    reason = re.split(r"Exception encountered: |Example error message for object <.*?>:", str(error))[-1].strip()
    return shorten((reason or type(error).__name__).splitlines()[0], 200, placeholder="...")


def save_model(model: keras.Model, path: Path) -> None:
    """Write `model` to a .keras or .h5 file, which plain Keras opens without this package."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Keras warns that .h5 is a legacy format
    try:
        with atomic_path(path) as temporary:
            model.save(temporary)
    finally:
        logger.setLevel(level)
