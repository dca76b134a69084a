"""Where clean images come from, how they are split, and whether they are those that a run was made with."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dae.config import RunConfig
from dae.data import array_files, image_folder, storage
from dae.data.array_files import Found
from dae.errors import UsageError, choose, first_line

# SHA-256 of the bytes of MNIST's image arrays, as dae/data/README.md tells where they come from.
MNIST_DIGESTS = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
MNIST_FILE = Path(__file__).parent / "mnist" / "mnist.npz"
# What Keras looks for before it downloads, and in which folder.
KERAS_FILES = {
    "fashion_mnist": "the four files train-images-idx3-ubyte.gz ... of github.com/zalandoresearch/fashion-mnist "
    "into {}/fashion-mnist",
    "cifar10": "www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz as {}/cifar-10-batches-py-target_archive",
}
# By default a tenth of the images is split off to validate, and, where there is no test part, to test; at most these.
MOST_VALIDATION, MOST_TEST = 5_000, 10_000


@dataclasses.dataclass(frozen=True)
class Splits:
    """Clean images, uint8 [N, H, W, C]: to train on, to validate on (perhaps none) and to test on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()
    """What the user should be told of how the images were read."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all the images and their shapes."""
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


def mnist() -> Found:
    """MNIST's 60,000 training and 10,000 test images, uint8 [N, 28, 28, 1]; raises UsageError if damaged."""
    train, test, _ = array_files.read_npz(MNIST_FILE)
    for name, images in (("x_train", train), ("x_test", test)):
        if hashlib.sha256(np.ascontiguousarray(images).data).hexdigest() != MNIST_DIGESTS[name]:
            raise UsageError(f"--dataset mnist: {MNIST_FILE} is damaged ({name}); install the package again")
    return train, test, []


def training_labels(config: RunConfig) -> np.ndarray | None:
    """What the training images of a run show (with MNIST the digit, uint8 [N], those that validate last).

    None where that is not known. For TensorBoard's Projector alone: nothing is trained on labels.
    """
    if config.data is not None or config.dataset != "mnist":
        return None
    with np.load(MNIST_FILE, allow_pickle=False) as file:
        return file["y_train"]


def of_keras(name: str) -> Found:
    """The images of `keras.datasets`, which downloads them once; raises UsageError where it cannot."""
    import keras

    try:
        (train, _), (test, _) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # no network, a broken file: Keras raises what it likes
        folder = os.path.join(os.environ.get("KERAS_HOME", "~/.keras"), "datasets")
        raise UsageError(
            f"--dataset {name}: Keras could not download or read it ({first_line(error)}); "
            f"without a network, put {KERAS_FILES[name].format(folder)}"
        ) from None
    channels = () if train.ndim == 4 else (1,)
    return train.reshape(*train.shape, *channels), test.reshape(*test.shape, *channels), []


DATASETS: dict[str, Callable[[], Found]] = {
    "mnist": mnist,
    **{name: functools.partial(of_keras, name) for name in KERAS_FILES},
}


def load(config: RunConfig) -> Splits:
    """The images that `config` asks for, split; raises UsageError where they are missing, broken or too few.

    A set without a test part gets one of a tenth of its images, drawn by a fixed seed, not by `config.seed`: runs
    that differ in that are tested on the same images.
    """
    name = f"--dataset {config.dataset}" if config.data is None else f"--data: {config.data}"
    try:
        train, test, notes = _found(config)
        if test is None:
            if len(train) < 2:
                raise UsageError(f"{name}: holds one image; needed are two, one to train on and one to test on")
            # RandomState's permutations are the same in every version of NumPy.
            shuffled = storage.selected(train, np.random.RandomState(0).permutation(len(train)))
            tested = min(MOST_TEST, max(1, len(train) // 10))
            train, test = shuffled[tested:], shuffled[:tested]
            notes.append(f"no test part: {tested:,} of {len(shuffled):,} images, drawn by a fixed seed, make one")
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
    if train.shape[1:] != test.shape[1:]:
        raise UsageError(f"{name}: has training images of {train.shape[1:]}, test images of {test.shape[1:]}")
    if train[:1000].max() <= 1:
        notes.append("nothing above 1 of 255, so all but black; where 1 is to be white, save the images as floats")
    validated = config.validation_examples
    if validated is None:
        validated = min(MOST_VALIDATION, len(train) // 10)
    available = len(train) - validated
    if available < 1:
        raise UsageError(f"--validation-examples: {validated} of {len(train)} leave none to train on")
    if config.train_examples is not None and config.train_examples > available:
        raise UsageError(
            f"--train-examples: {config.train_examples} is more than the {available} that "
            f"--validation-examples {validated} leaves"
        )
    trained = config.train_examples or available
    if trained < config.batch_size:
        notes.append(f"--batch-size {config.batch_size} is more than the {trained} training images: each step has all")
    splits = Splits(train[:trained], train[available:], test, tuple(notes))
    if config.data_digest not in (None, splits.digest):
        raise UsageError(
            f"{name}: its images are not those that the run was made with "
            f"(SHA-256 {splits.digest}, not {config.data_digest})"
        )
    return splits


def _found(config: RunConfig) -> Found:
    """What lies where `config` says, by what it is: a known name, a file or a folder."""
    path = None if config.data is None else Path(config.data)
    files = sorted(path.iterdir()) if path is not None and path.is_dir() else []
    if path is not None and path.is_dir() and not any(array_files.IDX_NAME.fullmatch(file.name) for file in files):
        return image_folder.read(path, config.image_size, config.skip_broken)
    for flag, given in (("--image-size", config.image_size), ("--skip-broken", config.skip_broken)):
        if given:
            raise UsageError(f"{flag}: is for a folder of pictures, which --data does not name here")
    if path is None:
        return choose(DATASETS, config.dataset, "--dataset")()
    if files:
        return array_files.read_idx(files)
    if path.suffix == ".npy":
        return array_files.read_npy(path)
    if array_files.IDX_NAME.fullmatch(path.name):
        return array_files.read_idx([path])
    if path.suffix != ".npz" and path.exists():
        raise UsageError(f"--data: {path}: not an .npz, .npy or IDX file (train-images-idx3-ubyte), nor a folder")
    return array_files.read_npz(path)
