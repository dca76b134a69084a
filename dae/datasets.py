"""Where clean images come from: MNIST, which the package carries, or an .npz file of the user's own."""

import dataclasses
import hashlib
import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dae.config import RunConfig
from dae.errors import UsageError, choose

# SHA-256 of the bytes of MNIST's image arrays, as dae/data/README.md tells where they come from.
MNIST_DIGESTS = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
MNIST_FILE = Path(__file__).parent / "data" / "mnist.npz"


@dataclasses.dataclass(frozen=True)
class Splits:
    """Clean images, uint8 [N, H, W, C]: to train on, to validate on (perhaps none) and to test on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 of all the images and their shapes."""
        digest = hashlib.sha256()
        for images in (self.train, self.validation, self.test):
            digest.update(str(images.shape).encode() + np.ascontiguousarray(images).data)
        return digest.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.train.shape[1:]
        return height, width, channels


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 60,000 training and 10,000 test images, uint8 [N, 28, 28, 1]; raises UsageError if damaged."""
    arrays = {name: _read_npz_images(MNIST_FILE, name, "--dataset mnist") for name in MNIST_DIGESTS}
    for name, array in arrays.items():
        if hashlib.sha256(array.tobytes()).hexdigest() != MNIST_DIGESTS[name]:
            raise UsageError(f"--dataset mnist: {MNIST_FILE} is damaged ({name}); install the package again")
    return arrays["x_train"], arrays["x_test"]


def training_labels(config: RunConfig) -> np.ndarray | None:
    """What the training images of a run show (with MNIST the digit, uint8 [N], those that validate last).

    None where that is not known. For TensorBoard's Projector alone: nothing is trained on labels.
    """
    if config.data is not None or config.dataset != "mnist":
        return None
    with np.load(MNIST_FILE, allow_pickle=False) as arrays:
        return arrays["y_train"]


DATASETS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"mnist": mnist}


def load(config: RunConfig) -> Splits:
    """The images that `config` asks for, split; raises UsageError where they are missing, broken or too few."""
    if config.data is None:
        train, test = choose(DATASETS, config.dataset, "--dataset")()
    else:
        path = Path(config.data)
        train, test = (_read_npz_images(path, name, "--data") for name in ("x_train", "x_test"))
        if train.shape[1:] != test.shape[1:]:
            raise UsageError(f"--data: {path}: x_train has images of {train.shape[1:]}, x_test of {test.shape[1:]}")
    available = len(train) - config.validation_examples
    if available < 1:
        raise UsageError(f"--validation-examples: {config.validation_examples} of {len(train)} leave none to train on")
    if config.train_examples is not None and config.train_examples > available:
        raise UsageError(
            f"--train-examples: {config.train_examples} is more than the {available} that "
            f"--validation-examples {config.validation_examples} leaves"
        )
    splits = Splits(train[: config.train_examples or available], train[available:], test)
    if config.data_digest not in (None, splits.digest):
        raise UsageError(
            f"{'--data ' + config.data if config.data else '--dataset ' + config.dataset}: its images are not those "
            f"that the run was made with (SHA-256 {splits.digest}, not {config.data_digest})"
        )
    return splits


def _read_npz_images(path: Path, name: str, flag: str) -> np.ndarray:
    """The array `name` of an .npz file as uint8 [N, H, W, C]; raises UsageError for anything else.

    The array's header is held against the archive's own record of its size, and that against the size of the file,
    before anything is allocated, and pickled objects are refused: a hostile file costs neither memory nor trust.
    """
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            magic = np.lib.format.read_magic(file)
            if magic not in _HEADER_READERS:
                raise UsageError(f"{flag}: {path}: {name} has the .npy format {magic}, not 1.0 or 2.0")
            shape, fortran_order, dtype = _HEADER_READERS[magic](file)
            if dtype != np.uint8:
                raise UsageError(f"{flag}: {path}: {name} is {dtype}, not uint8 (0 black to 255 white)")
            if len(shape) not in (3, 4) or shape[0] < 1 or min(shape[1:3]) < 11 or shape[3:] not in ((), (1,), (3,)):
                raise UsageError(
                    f"{flag}: {path}: {name} has shape {shape}, not [N, H, W] or [N, H, W, C] with N from 1, "
                    "H and W from 11 (SSIM needs that) and C 1 or 3"
                )
            size = int(np.prod(shape, dtype=object))
            if file.tell() + size != archive.getinfo(member).file_size:
                raise UsageError(f"{flag}: {path}: {name} says shape {shape}, but holds another number of bytes")
            if size > _MAX_EXPANSION * path.stat().st_size:
                raise UsageError(f"{flag}: {path}: {name} is packed more than {_MAX_EXPANSION}-fold, as images are not")
            pixels = np.frombuffer(file.read(), np.uint8)
        images = pixels.reshape(shape, order="F" if fortran_order else "C")
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{flag}: {path}: no such file") from None
    except KeyError:
        raise UsageError(f"{flag}: {path}: has no array {name!r} (needed: x_train, x_test)") from None
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{flag}: {path}: not a readable .npz file ({reason})") from None
    return images if images.ndim == 4 else images[..., np.newaxis]


_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# MNIST, which is mostly black, packs 5-fold; the most that the format can is 1,030-fold.
_MAX_EXPANSION = 200
# What zipfile and NumPy are known to raise for broken bytes.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
