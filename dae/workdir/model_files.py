"""Using a finished model, by its run or by its file."""

import logging
from pathlib import Path

import keras
import numpy as np

from dae.config import RunConfig
from dae.data.pipeline import evaluation_batches, first_evaluation_batch
from dae.errors import UsageError, first_line
from dae.evaluation.metrics import Evaluate, psnr, ssim
from dae.reporting import plots
from dae.workdir import hdf5_check
from dae.workdir.workdir import check_finished, replacing

MODEL_FILES = ("model.keras", "model.h5")
SHOWN_IN_FIGURE = 10


def load_model(path: str | Path) -> keras.Model:
    """The model of a finished run's folder, or of a .keras or .h5 file.

    It takes and returns float32 [N, H, W, C] in [0, 1]. Raises UsageError where there is none to be read. The file
    need not be trusted: Keras runs no code of it (safe mode), and what it says of its own size is held against it.
    """
    path = Path(path)
    if path.is_dir():
        check_finished(path)
        path = path / MODEL_FILES[0]
    if path.suffix not in (".keras", ".h5"):
        raise UsageError(f"{path}: neither a run's folder nor a .keras or .h5 file")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        if path.suffix == ".h5":
            hdf5_check.check(path)
        # A first time with the shapes of the weights alone: a few bytes may declare a layer of terabytes.
        with keras.StatelessScope(initialize_variables=False):
            weights = keras.models.load_model(path, compile=False).count_params()
        if weights > path.stat().st_size:
            raise UsageError(f"{path}: declares {weights:,} weights, more than it has bytes")
        model = keras.models.load_model(path, compile=False)
    except UsageError:
        raise
    except Exception as error:  # a broken or hostile file: Keras, h5py and zipfile raise what they like
        raise UsageError(f"{path}: not a readable model ({first_line(error)})") from None
    if len(model.input_shape) != 4 or model.input_shape != model.output_shape:
        raise UsageError(f"{path}: takes {model.input_shape} and returns {model.output_shape}, no denoiser of images")
    return model


def save_model(model: keras.Model, path: Path) -> None:
    """Writes `model` to a .keras or .h5 file, which plain Keras opens without this package."""
    advice = logging.getLogger("absl")
    level = advice.level
    advice.setLevel(logging.ERROR)  # no advice against .h5: it is asked for
    try:
        with replacing(path) as temporary:
            model.save(temporary)
    finally:
        advice.setLevel(level)


def check_fits(model: keras.Model, images: np.ndarray) -> None:
    """Raises UsageError unless `model` takes images like `images`, [N, H, W, C]."""
    if model.input_shape[1:] != images.shape[1:]:
        raise UsageError(f"--data: images of {images.shape[1:]}, but the model takes {model.input_shape[1:]}")


def test(
    model: keras.Model, evaluate: Evaluate, config: RunConfig, images: np.ndarray, figure: Path
) -> dict[str, float]:
    """The figures `test_psnr` ... that `evaluate` has for `model` on test images, uint8 [N, H, W, C].

    Draws the first few. The noise is that of `config`; `figure` is the path of the picture, a PNG. Raises UsageError
    where model and images do not fit each other.
    """
    check_fits(model, images)
    noisy, clean = (some[:SHOWN_IN_FIGURE] for some in first_evaluation_batch(images, config, "test"))
    denoised = model(noisy)
    quality = [(psnr(clean, images).numpy(), ssim(clean, images).numpy()) for images in (noisy, denoised)]
    plots.save_denoised(figure, noisy.numpy(), denoised.numpy(), clean.numpy(), *quality)
    return {f"test_{name}": value for name, value in evaluate(evaluation_batches(images, config, "test")).items()}
