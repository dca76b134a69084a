"""Model files: model.keras and model.h5 of a run, or other files of those formats; and weights of users' networks.

The network of a user's file is built by the function in the run's copy of that file, and gets the weights in
model.weights.h5. All other models are those in model.keras, or in a file, from which no code runs.

A run's model files also hold the value range of its images, where Keras ignores it: .keras files as the comment of the
.zip file that they are, and .h5 files in the attribute `dae.json`.
"""

import hashlib
import logging
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np

from dae import config as config_module
from dae import plugins, resolved
from dae.data.values import NOTE, ValueRange
from dae.errors import UsageError, as_usage_error, listed, shown, warn
from dae.files import atomic_path
from dae.machine import keras_defaults
from dae.models import networks, sizes
from dae.models.fused_layers import outputs
from dae.training.checkpoints import restored_model
from dae.workdir.workdir import CONFIG, REPORT, read_report

MODEL_FILES = ("model.keras", "model.h5")
WEIGHTS = "model.weights.h5"
# The outputs for images in [0, 1] of a model that is meant for such images.
OUTPUTS = (-0.5, 1.5)


@keras_defaults()
def load_model(path: str | Path) -> keras.Model:
    """Load the model of a run's folder, or of a .keras or .h5 file.

    A run that is not finished has the model of its best checkpoint, or of the latest one if nothing validates; a
    warning names it.

    The model maps float32 [N, H, W, C] in [0, 1] to the same shape; outputs of a network that is not bounded can leave
    [0, 1]. A run of a user's network runs the copy of the user's file in the run's folder; Keras runs no code from a
    model file (safe mode). Raises UsageError if there is no such model, or if the outputs of one that is not a run's
    show that it takes or returns other values.
    """
    path, hint = Path(path), ""
    if path.is_dir():
        if (path / CONFIG).exists() and not (path / REPORT).exists():
            return _of_run(path, restored_model(path))
        epochs = read_report(path).get("epochs")  # missing in reports of earlier versions
        if epochs is not None and epochs < (wanted := config_module.read(path / CONFIG).epochs):
            warn(f"{path}: using the model of its report, after {epochs:g} of {wanted} epochs")
        if (path / WEIGHTS).exists():
            network = config_module.read(path / CONFIG).model
            if not plugins.is_lost(network):
                return _of_run(path, _built(path))
            hint = f"; its network was a Python function, so call dae.RunConfig(model={plugins.label(network)}) first"
        path = path / MODEL_FILES[0]
        if not path.is_file():
            if hint:
                raise UsageError(f"{path.parent}: Keras cannot save this model{hint}")
            raise UsageError(f"{path}: no such file; delete {REPORT}, and repeat run.py with --resume to write it")
    if not path.exists():
        raise UsageError(f"{path}: no such run or model file; expected a run's folder, or a .keras or .h5 file")
    if path.suffix not in (".keras", ".h5") or not path.is_file():
        raise UsageError(f"{path}: expected a run's folder, or a .keras or .h5 file")
    with as_usage_error(path, f"not a readable model{hint}", Exception):  # Keras, h5py and zipfile raise many types
        model = keras.models.load_model(path, compile=False)
        value_range = _read_value_range(path)
    names_output = isinstance(getattr(model, "output", None), dict)
    if names_output or len(model.input_shape) != 4 or model.input_shape != model.output_shape:
        shapes = f"{shown(model.input_shape)} to {shown(model.output_shape)}"
        raise UsageError(f"{path}: expected a model from images to images of the same shape, got one from {shapes}")
    if value_range is None:
        _check_outputs(model, path)
    model.dae_value_range = value_range
    return model


def _of_run(run: Path, built: keras.Model) -> keras.Model:
    """Return the network of a run for images of any size, with the value range of the run's images."""
    model = sizes.any_size(built)
    model.dae_value_range = resolved.read(run).value_range
    return model


def _built(run: Path) -> keras.Model:
    """Return the network of a run that the function of a user builds, with its weights."""
    model = networks.build(config_module.read(run / CONFIG), resolved.read(run).image_shape)
    with as_usage_error(run / WEIGHTS, "not the weights of the run's network", Exception):
        model.load_weights(run / WEIGHTS)
    return model


def value_range_of(model: keras.Model) -> ValueRange | None:
    """Return the value range of the images that a loaded model was trained on, or None for one that is not a run's."""
    return getattr(model, "dae_value_range", None)


def _read_value_range(path: Path) -> ValueRange | None:
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            text = file.attrs.get(NOTE)
    else:
        with zipfile.ZipFile(path) as archive:
            text = archive.comment
    return ValueRange.from_json(text) if text else None


def _check_outputs(model: keras.Model, path: Path) -> None:
    """Raise UsageError if outputs for images in [0, 1] are far out of [0, 1]; warn if they hardly depend on these."""
    size = sizes.fitting_size(model, *(side or 64 for side in model.input_shape[1:3]))
    random = np.random.default_rng(0).random((1, *size, model.input_shape[-1] or 1), np.float32)
    images = np.concatenate([np.zeros_like(random), random, np.ones_like(random)])
    returned = np.concatenate([np.asarray(model(image[None], training=False)) for image in images])
    least, most = returned.min(), returned.max()
    if not OUTPUTS[0] <= least <= most <= OUTPUTS[1]:
        raise UsageError(
            f"{path}: outputs from {least:.3g} to {most:.3g} for images from 0 (black) to 1 (white); expected a model "
            "that takes and returns such images"
        )
    if returned[2].mean() - returned[0].mean() < 0.1:
        warn(f"{path}: white images come out hardly brighter than black ones; the model should take values from 0 to 1")


def weights_digest(model: keras.Model) -> str:
    """Return the SHA-256 of all weights, little-endian, in the order of `get_weights()`."""
    arrays = [np.ascontiguousarray(weight) for weight in model.get_weights()]
    return hashlib.sha256(
        b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    ).hexdigest()


def save_all(model: keras.Model, folder: Path, value_range: ValueRange, is_own: bool) -> list[str]:
    """Write the model files of a run. Return a line on those that are missing, if there are any.

    Those of a user's network (`is_own`) are kept only if Keras alone restores the same network from them; its weights
    are always written.
    """
    free, missing = sizes.any_size(model), []
    if is_own:
        with atomic_path(folder / WEIGHTS) as temporary:
            model.save_weights(temporary)
    noisy = np.random.default_rng(0).random((1, *(side or 64 for side in model.input_shape[1:])), np.float32)
    for name in MODEL_FILES:
        path = folder / name
        try:
            save_model(free, path, value_range)
            if is_own:
                with plugins.without_registered():
                    restored = keras.models.load_model(path, compile=False)
                if not np.allclose(outputs(restored, noisy), outputs(model, noisy), atol=1e-6):
                    raise ValueError("is restored as another network")
        except Exception as error:  # of many types, for layers that Keras cannot save or restore
            if not is_own or isinstance(error, OSError):
                raise
            path.unlink(missing_ok=True)  # also that of fewer epochs
            missing.append(name)
    return [f"model files: without {listed(missing)}, from which Keras alone cannot restore it"] if missing else []


def save_model(model: keras.Model, path: Path, value_range: ValueRange | None = None) -> None:
    """Write `model` to a .keras or .h5 file. Keras alone opens it if the model consists of Keras's layers.

    The file also holds the `value_range` of the images that the model was trained on.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Keras warns that .h5 is a legacy format
    try:
        with atomic_path(path) as temporary:
            model.save(temporary)
            if value_range is not None:
                _write_note(temporary, value_range.to_json())
    finally:
        logger.setLevel(level)


def _write_note(path: Path, text: str) -> None:
    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            file.attrs[NOTE] = text
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = text.encode()
