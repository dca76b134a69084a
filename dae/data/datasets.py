"""Data sets: where the clean images come from, how they are split, and the digest by which a run recognizes them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dae.config import RunConfig
from dae.data import array_files, image_folder, storage
from dae.data.array_files import RawImages
from dae.errors import UsageError, first_line, lookup

# SHA-256 of the bytes of MNIST's image arrays; mnist/README.md describes their origin.
MNIST_DIGESTS = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
MNIST_FILE = Path(__file__).parent / "mnist" / "mnist.npz"
# The files that Keras looks for before it downloads them, and where.
KERAS_FILES = {
    "fashion_mnist": "the four files train-images-idx3-ubyte.gz ... of github.com/zalandoresearch/fashion-mnist "
    "into {}/fashion-mnist",
    "cifar10": "www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz as {}/cifar-10-batches-py-target_archive",
}
# By default a tenth of the images, at most this many, validates, and, if there are no test images, tests.
MAX_VALIDATION, MAX_TEST = 5_000, 10_000


@dataclasses.dataclass(frozen=True)
class Splits:
    """Clean images, uint8 [N, H, W, C], to train, to validate (possibly none) and to test on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()
    """What the user should know about how the images were read."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all images and their shapes."""
        digest = hashlib.sha256()
        for images in (self.train, self.validation, self.test):
            digest.update(str(images.shape).encode())
            digest.update(np.ascontiguousarray(images).data)
        return digest.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.train.shape[1:]
        return height, width, channels


def mnist() -> RawImages:
    """Return MNIST's 60,000 training and 10,000 test images, uint8 [N, 28, 28, 1]. Raises UsageError if damaged."""
    raw = array_files.read_npz(MNIST_FILE)
    for name, images in (("x_train", raw.train), ("x_test", raw.test)):
        if hashlib.sha256(np.ascontiguousarray(images).data).hexdigest() != MNIST_DIGESTS[name]:
            raise UsageError(f"--dataset mnist: {MNIST_FILE} is damaged ({name}); install the package again")
    return raw


def training_labels(config: RunConfig) -> np.ndarray | None:
    """Return the labels of a run's training images, validation images last: the digits of MNIST, uint8 [N], or None.

    Only TensorBoard's Projector shows them; nothing is trained on labels.
    """
    if config.data is not None or config.dataset != "mnist":
        return None
    with np.load(MNIST_FILE, allow_pickle=False) as file:
        return file["y_train"]


def from_keras(name: str) -> RawImages:
    """Return the images of `keras.datasets`, which downloads them once. Raises UsageError if it cannot."""
    import keras

    try:
        (train, _), (test, _) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # no network, a damaged file: Keras raises many types
        folder = os.path.join(os.environ.get("KERAS_HOME", "~/.keras"), "datasets")
        raise UsageError(
            f"--dataset {name}: Keras could not download or read it ({first_line(error)}); "
            f"without a network, put {KERAS_FILES[name].format(folder)}"
        ) from None
    channels = () if train.ndim == 4 else (1,)
    return RawImages(train.reshape(*train.shape, *channels), test.reshape(*test.shape, *channels), [])


DATASETS: dict[str, Callable[[], RawImages]] = {
    "mnist": mnist,
    **{name: functools.partial(from_keras, name) for name in KERAS_FILES},
}


def load(config: RunConfig) -> Splits:
    """Return the images that `config` describes, split. Raises UsageError if they are missing, damaged or too few."""
    name = f"--dataset {config.dataset}" if config.data is None else f"--data: {config.data}"
    try:
        train, test, notes = _read(config)
        if test is None:
            train, test = _split_off_test(train, name)
            notes.append(f"no test images: {len(test):,} of {len(train) + len(test):,}, drawn by a fixed seed, test")
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
    if train.shape[1:] != test.shape[1:]:
        raise UsageError(f"{name}: training images of {train.shape[1:]}, but test images of {test.shape[1:]}")
    if train[:1000].max() <= 1:
        notes.append("no value above 1 of 255, so nearly black; save the images as floats if 1 is white")
    splits = _split_off_validation(train, test, config, notes)
    if config.data_digest not in (None, splits.digest):
        raise UsageError(
            f"{name}: the images differ from those the run was made with "
            f"(expected SHA-256 {config.data_digest}, got {splits.digest})"
        )
    return splits


def _read(config: RunConfig) -> RawImages:
    """Read the data set, file or folder that `config` names."""
    path = None if config.data is None else Path(config.data)
    files = sorted(path.iterdir()) if path is not None and path.is_dir() else []
    if path is not None and path.is_dir() and not any(array_files.IDX_NAME.fullmatch(file.name) for file in files):
        return image_folder.read(path, config.image_size, config.skip_broken)
    for flag, value in (("--image-size", config.image_size), ("--skip-broken", config.skip_broken)):
        if value:
            raise UsageError(f"{flag}: applies only to a folder of pictures, which --data does not name")
    if path is None:
        return lookup(DATASETS, config.dataset, "--dataset")()
    if files:
        return array_files.read_idx(files)
    if path.suffix == ".npy":
        return array_files.read_npy(path)
    if array_files.IDX_NAME.fullmatch(path.name):
        return array_files.read_idx([path])
    if path.suffix != ".npz" and path.exists():
        raise UsageError(
            f"--data: {path}: expected a folder, or an .npz, .npy or IDX file (such as train-images-idx3-ubyte)"
        )
    return array_files.read_npz(path)


def _split_off_test(images: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a tenth of the images, by a fixed seed, for testing: runs with different seeds share their test images."""
    if len(images) < 2:
        raise UsageError(f"{name}: expected at least two images, one to train and one to test on, got one")
    # RandomState's permutations are the same in every version of NumPy.
    shuffled = storage.take(images, np.random.RandomState(0).permutation(len(images)))
    tested = min(MAX_TEST, max(1, len(images) // 10))
    return shuffled[tested:], shuffled[:tested]


def _split_off_validation(train: np.ndarray, test: np.ndarray, config: RunConfig, notes: list[str]) -> Splits:
    """Take the validation images from the end of the training images, and as many others to train on as asked for."""
    validated = config.validation_examples
    if validated is None:
        validated = min(MAX_VALIDATION, len(train) // 10)
    available = len(train) - validated
    if available < 1:
        raise UsageError(f"--validation-examples: {validated} of {len(train)} leave none to train on")
    if config.train_examples is not None and config.train_examples > available:
        raise UsageError(
            f"--train-examples: {config.train_examples} exceeds the {available} that --validation-examples {validated} "
            "leaves"
        )
    trained = config.train_examples or available
    if trained < config.batch_size:
        notes.append(
            f"--batch-size {config.batch_size} exceeds the {trained} training images; a step takes all of them"
        )
    return Splits(train[:trained], train[available:], test, tuple(notes))
