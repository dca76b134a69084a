"""Model files: a run's model.keras and model.h5, or any other file of those formats."""

import contextlib
import logging
import re
from pathlib import Path
from textwrap import shorten

import h5py
import keras

from dae.errors import UsageError, shown
from dae.workdir import hdf5_check
from dae.workdir.files import atomic_path
from dae.workdir.workdir import REPORT, read_report

MODEL_FILES = ("model.keras", "model.h5")


def load_model(path: str | Path) -> keras.Model:
    """Load the model of a finished run's folder, or of a .keras or .h5 file.

    It takes and returns float32 [N, H, W, C] in [0, 1]. The file need not be trusted: Keras runs no code from it (safe
    mode), and memory stays bounded. Raises UsageError if there is no such model.
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
        if path.suffix == ".h5":
            hdf5_check.check(path)
        # First only the shapes of the weights: a few bytes can claim a layer of terabytes.
        with keras.StatelessScope(initialize_variables=False):
            weights = _load(path).count_params()
        if weights > path.stat().st_size:
            raise UsageError(f"{path}: claims {weights:,} weights, more than it has bytes")
        model = _load(path)
    except UsageError:
        raise
    except Exception as error:  # Keras, h5py and zipfile raise many types
        raise UsageError(f"{path}: not a readable model ({_reason(error)})") from None
    if isinstance(getattr(model, "output", None), dict):  # one that names its output
        raise UsageError(f"{path}: expected a model from images to images, got one to a dictionary")
    if len(model.input_shape) != 4 or model.input_shape != model.output_shape:
        raise UsageError(
            f"{path}: expected a model from images to images of the same shape, got one from "
            f"{shown(model.input_shape)} to {shown(model.output_shape)}"
        )
    return model


# What Keras says of a layer that it cannot make or fill, before the reason.
_OF_LAYER = re.compile(
    r"Error when deserializing class '(?P<kind>\w+)' using config=\{'name': '(?P<name>[^']*)'"
    r"|Example error message for object <(?P<kind_of_weights>\w+) name=(?P<name_of_weights>[^,>]*).*?>:\s*"
)


def _reason(error: Exception) -> str:
    """Return why a model cannot be loaded, in a line of at most about 200 characters, from Keras's long message."""
    message = str(error)
    layer = _OF_LAYER.search(message)
    reason = message.rpartition("Exception encountered: ")[2].strip()
    if layer is None:
        where = ""
    elif layer["kind"]:
        where = f"layer {layer['name']}, {layer['kind']}: "
    else:
        where, reason = f"layer {layer['name_of_weights']}, {layer['kind_of_weights']}: ", message[layer.end() :]
    # What follows is advice, or a configuration.
    first, *others = re.split(r"(?<=[.!?]) +", next(iter(reason.splitlines()), type(error).__name__))
    for sentence in others:
        if len(first) + len(sentence) > 120:
            break
        first += f" {sentence}"
    return f"{where[:80]}{shorten(first, 150, placeholder='...')}"


class _Unlocked(h5py.File):
    """An HDF5 file that Keras takes for a path, without the lock of the HDF5 library.

    Some file systems have no locks. A model is written to a temporary file that nobody else knows, and only read later.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode, locking=False)

    def __str__(self) -> str:
        return self.filename

    def __fspath__(self) -> str:
        return self.filename


def _opened(path: Path, mode: str) -> contextlib.AbstractContextManager[Path | _Unlocked]:
    """Return what Keras saves to or loads from, as a context that closes it."""
    return _Unlocked(path, mode) if path.suffix == ".h5" else contextlib.nullcontext(path)


def _load(path: Path) -> keras.Model:
    with _opened(path, "r") as file:
        return keras.models.load_model(file, compile=False)


def save_model(model: keras.Model, path: Path) -> None:
    """Write `model` to a .keras or .h5 file, which plain Keras opens without this package."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Keras warns that .h5 is a legacy format
    try:
        with atomic_path(path) as temporary, _opened(temporary, "w") as file:
            model.save(file)
    finally:
        logger.setLevel(level)
