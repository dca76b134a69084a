"""Data sets: where the images come from, how they are split, and the digest by which a run recognizes them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dae.config import PYTHON_DATA, RunConfig
from dae.data import array_files, checks, image_folder
from dae.data.examples import examples_per_epoch
from dae.data.images import Images, Parts
from dae.data.layout import TEST, TRAIN, VALIDATION
from dae.errors import UsageError, as_usage_error, first_line, lookup

# An array, or several by name as in an .npz file.
Arrays = np.ndarray | Mapping[str, np.ndarray]

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
    """Images to train, to validate (possibly none) and to test on."""

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()
    """What was read, one line for each part, and what the user should know about it."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all images and their shapes."""
        digest = hashlib.sha256()
        for images in (self.train, self.validation, self.test):
            images.update_digest(digest)
        return digest.hexdigest()


def mnist() -> dict[str, np.ndarray]:
    """Return MNIST's 60,000 training and 10,000 test images, uint8 [N, 28, 28]. Raises UsageError if damaged."""
    errors = as_usage_error(f"--dataset mnist: {MNIST_FILE}", "damaged; install the package again", Exception)
    with errors, np.load(MNIST_FILE, allow_pickle=False) as file:
        arrays = {name: file[name] for name in MNIST_DIGESTS}
    for name, images in arrays.items():
        if hashlib.sha256(images.data).hexdigest() != MNIST_DIGESTS[name]:
            raise UsageError(f"--dataset mnist: {MNIST_FILE} is damaged ({name}); install the package again")
    return arrays


def training_labels(config: RunConfig) -> np.ndarray | None:
    """Return the labels of a run's training images, validation images last: the digits of MNIST, uint8 [N], or None.

    Only TensorBoard's Projector shows them; nothing is trained on labels.
    """
    if config.data is not None or config.dataset != "mnist":
        return None
    with np.load(MNIST_FILE, allow_pickle=False) as file:
        return file["y_train"]


def from_keras(name: str) -> dict[str, np.ndarray]:
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
    return {"x_train": train, "x_test": test}


DATASETS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "mnist": mnist,
    **{name: functools.partial(from_keras, name) for name in KERAS_FILES},
}


def load(config: RunConfig, data: Arrays | None = None) -> Splits:
    """Return the images that `config` describes, split.

    `data` are the arrays that `config` records as PYTHON_DATA. Raises UsageError if images are missing, damaged, too
    few, or others than those whose digest `config` records, and if their values hardly fit their range.
    """
    name = source(config)
    images, notes = _read(config, data)
    if TRAIN not in images:
        raise UsageError(
            f"{name}: has no part to train on, only {' and '.join(images)}; expected train, such as a folder train or "
            "an array x_train, or no parts"
        )
    train, test, validation = images[TRAIN], images.get(TEST), images.get(VALIDATION)
    roles = {TEST: "", VALIDATION: ""}
    if test is None:
        train, test = _split_off_test(train, name)
        roles[TEST] = ", drawn from the others by a fixed seed"
    if validation is None:
        train, validation = _split_off_validation(train, config)
        roles[VALIDATION] = ", the last of those to train on" if len(validation) else ""
    elif config.validation_examples is not None:
        left_out = len(validation) - config.validation_examples
        if left_out < 0:
            raise UsageError(
                f"--validation-examples: {config.validation_examples} exceeds the {len(validation)} there are"
            )
        validation = validation[left_out:]
    if config.train_examples is not None and config.train_examples > len(train):
        given = "" if config.validation_examples is None else f" that --validation-examples {len(validation)} leaves"
        raise UsageError(f"--train-examples: {config.train_examples} exceeds the {len(train)}{given}")
    train = train[: config.train_examples]
    parts = {TRAIN: train, VALIDATION: validation, TEST: test}
    for part, one in parts.items():
        checks.check_same_kind(one, train, part, config, name)
        checks.check_values(one, part, config, name)
    checks.check_brightness(parts.values(), config, name)
    lines = [checks.describe(one, part) + roles.get(part, "") for part, one in parts.items()]
    examples = examples_per_epoch(train, config)
    if config.patch_size is not None:
        lines[0] += f"; an epoch has {examples:,} patches of {config.patch_size} x {config.patch_size}"
    if examples < config.batch_size:
        kind = "training images" if config.patch_size is None else "patches of an epoch"
        notes.append(f"--batch-size {config.batch_size} exceeds the {examples} {kind}; a step takes all of them")
    splits = Splits(train, validation, test, (*lines, *notes))
    if config.data_digest not in (None, splits.digest):
        raise UsageError(
            f"{name}: the images differ from those the run was made with "
            f"(expected SHA-256 {config.data_digest}, got {splits.digest})"
        )
    return splits


def load_test(config: RunConfig) -> tuple[Images, tuple[str, ...]]:
    """Return the test images of the data that `config` names, or all if they are not divided into parts, and notes.

    Pictures can have several sizes. Raises UsageError as `load` does.
    """
    name = source(config)
    images, notes = _read(config, None, keep_sizes=True)
    if TEST not in images and len(images) > 1:
        raise UsageError(
            f"{name}: has no part to test on, only {' and '.join(images)}; expected test, such as a folder "
            "test or an array x_test, or no parts"
        )
    test = images.get(TEST, next(iter(images.values())))
    checks.check_values(test, TEST, config, name)
    checks.check_brightness([test], config, name)
    return test, (checks.describe(test, TEST), *notes)


def source(config: RunConfig) -> str:
    """Return the name of the data set for messages."""
    if config.data is None:
        return f"--dataset {config.dataset}"
    return "data" if config.data == PYTHON_DATA else f"--data: {config.data}"


def _read(config: RunConfig, data: Arrays | None, keep_sizes: bool = False) -> Parts:
    """Read the data set, file or folder that `config` names; `keep_sizes` allows pictures of several sizes."""
    path = None if config.data in (None, PYTHON_DATA) else Path(str(config.data))
    try:
        if path is not None and not path.exists():
            moved = "; if it was moved, add --data with its new place" if config.data_digest else ""
            raise UsageError(f"--data: {path}: no such file or folder{moved}")
        files = sorted(path.iterdir()) if path is not None and path.is_dir() else []
        if path is not None and path.is_dir() and not any(array_files.IDX_NAME.fullmatch(file.name) for file in files):
            return image_folder.read(path, config, keep_sizes or config.patch_size is not None)
        for flag, value in (("--image-size", config.image_size), ("--skip-broken", config.skip_broken)):
            if value:
                raise UsageError(f"{flag}: applies only to a folder of pictures, which --data does not name")
        if path is None:
            return array_files.from_memory(_arrays(config, data), config)
        if files:
            return array_files.read_idx(files, config)
        if path.suffix == ".npy":
            return array_files.read_npy(path, config)
        if path.suffix == ".npz":
            return array_files.read_npz(path, config)
        if array_files.IDX_NAME.fullmatch(path.name):
            return array_files.read_idx([path], config)
        raise UsageError(
            f"--data: {path}: expected a folder, or an .npz, .npy or IDX file (such as train-images-idx3-ubyte)"
        )
    except OSError as error:
        raise UsageError(f"{source(config)}: cannot be read ({error.strerror})") from None


def _arrays(config: RunConfig, data: Arrays | None) -> Arrays:
    if config.data is None:
        return lookup(DATASETS, config.dataset, "--dataset")()
    if data is None:
        raise UsageError("data: the images were Python arrays; pass them again: dae.train(config, data=images)")
    return data


def _split_off_test(images: Images, name: str) -> tuple[Images, Images]:
    """Draw a tenth of the images, by a fixed seed, for testing: runs with different seeds share their test images."""
    if len(images) < 2:
        raise UsageError(f"{name}: expected at least two images, one to train and one to test on, got one")
    # RandomState's permutations are the same in every version of NumPy.
    shuffled = images.take(np.random.RandomState(0).permutation(len(images)))
    tested = min(MAX_TEST, max(1, len(images) // 10))
    return shuffled[tested:], shuffled[:tested]


def _split_off_validation(train: Images, config: RunConfig) -> tuple[Images, Images]:
    """Take the validation images from the end of the training images."""
    validated = config.validation_examples
    if validated is None:
        validated = min(MAX_VALIDATION, len(train) // 10)
    if validated >= len(train):
        raise UsageError(f"--validation-examples: {validated} of {len(train)} leave none to train on")
    return train[: len(train) - validated], train[len(train) - validated :]
