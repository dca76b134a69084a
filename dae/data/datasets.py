"""Data sets: where the images come from, how they are split, and the digest by which a run recognizes them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dae.config import PYTHON_DATA, RunConfig
from dae.data import array_files, image_folder, pictures, values
from dae.data.images import Images, RawSplits, examples_per_epoch
from dae.data.layout import CLEAN, NOISY, TEST, TRAIN, VALIDATION
from dae.data.values import ValueRange, warn_if_nearly_black
from dae.errors import UsageError, as_usage_error, lookup

# An array, or several by name as in an .npz file.
Arrays = np.ndarray | Mapping[str, np.ndarray]

MNIST_FILE = Path(__file__).parent / "mnist" / "mnist.npz"
# By default a tenth of the images, at most this many, validates, and, if there are no test images, tests.
MAX_VALIDATION, MAX_TEST = 5_000, 10_000


@dataclasses.dataclass(frozen=True)
class Splits:
    """Images to train, to validate (possibly none) and to test on."""

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()
    """Notes for the user: a line on each split, and on what was not read."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all images and their shapes."""
        digests = [images.digest for images in (self.train, self.validation, self.test)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def with_noise_level(self, level: float, *notes: str) -> "Splits":
        """Return the images with the level of the noise in them, and further notes."""
        train, validation, test = (
            dataclasses.replace(images, noise_level=level) for images in (self.train, self.validation, self.test)
        )
        return Splits(train, validation, test, (*self.notes, *notes))


def mnist() -> dict[str, np.ndarray]:
    """Return MNIST's 60,000 training and 10,000 test images, uint8 [N, 28, 28]."""
    with np.load(MNIST_FILE, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("x_train", "x_test")}


def from_keras(name: str) -> dict[str, np.ndarray]:
    """Return the images of `keras.datasets`, which downloads them once. Raises UsageError if it cannot."""
    import keras

    # Without network, or for a damaged file, Keras raises many types.
    with as_usage_error(f"--dataset {name}", "Keras could not download or read it", Exception):
        (train, _), (test, _) = getattr(keras.datasets, name).load_data()
    return {"x_train": train, "x_test": test}


DATASETS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "mnist": mnist,
    **{name: functools.partial(from_keras, name) for name in ("fashion_mnist", "cifar10")},
}


def load(config: RunConfig, data: Arrays | None = None) -> Splits:
    """Return the images that `config` describes, split.

    `data` are the arrays that `config` records as PYTHON_DATA. Raises UsageError if images are missing, damaged, too
    few, or outside their value range; warns if they are nearly black.
    """
    name = source(config)
    images, notes = _read(config, data)
    if TRAIN not in images:
        raise UsageError(
            f"{name}: has no training images, only {' and '.join(images)}; expected a split train, or no splits"
        )
    splits, origins = _complete(images, config, name)
    _check_same_kind(splits, config, name)
    _check_values(splits, config, name)
    lines = [f"{split}: {splits[split].describe()}{origins.get(split, '')}" for split in splits]
    if config.patch_size is not None:
        examples = examples_per_epoch(splits[TRAIN], config)
        lines[0] += f"; an epoch has {examples:,} patches of {config.patch_size} x {config.patch_size}"
    return Splits(splits[TRAIN], splits[VALIDATION], splits[TEST], (*lines, *notes))


def load_test(config: RunConfig, trained: ValueRange | None = None) -> tuple[Images, tuple[str, ...]]:
    """Return the test images of the data that `config` names, or all images if they are not split, and notes.

    Images of the type that a model was `trained` on have its value range, unless `config` gives another one. Pictures
    can have several sizes. Raises UsageError as `load` does.
    """
    name = source(config)
    known = trained if config.value_range is None else None
    allowing = config if known is None else dataclasses.replace(config, value_range=(known.black, known.white))
    images, notes = _read(allowing, None, keep_sizes=True)
    if TEST not in images and len(images) > 1:
        raise UsageError(
            f"{name}: has no test images, only {' and '.join(images)}; expected a split test, or no splits"
        )
    test = images.get(TEST, next(iter(images.values())))
    if known is not None:
        with as_usage_error(name):
            test = dataclasses.replace(test, given_range=known.of(np.dtype(test.value_range.dtype)))
    _check_values({TEST: test}, config, name)
    return test, (f"{TEST}: {test.describe()}", *notes)


def source(config: RunConfig) -> str:
    """Return the name of the data set for messages."""
    given = {"--noisy": config.noisy, "--clean": config.clean}
    if any(given.values()):
        return ", ".join(f"{name}: {folder}" for name, folder in given.items() if folder)
    if config.data is None:
        return f"--dataset {config.dataset}"
    return "data" if config.data == PYTHON_DATA else f"--data: {config.data}"


def _read(config: RunConfig, data: Arrays | None, keep_sizes: bool = False) -> RawSplits:
    given = {None: config.data, CLEAN: config.clean, NOISY: config.noisy}
    paths = {role: Path(text) for role, text in given.items() if text is not None and text != PYTHON_DATA}
    for role, path in paths.items():
        if not (path.is_dir() if config.clean else path.exists()):
            name, kind = role or "data", "folder" if config.clean else "file or folder"
            raise UsageError(f"--{name}: {path}: no such {kind}; if it was moved, add --{name} with its new path")
    if paths and all(_holds_pictures(*item) for item in paths.items()):
        if config.axes is not None:
            raise UsageError("--axes: applies only to arrays, not to folders of pictures")
        with as_usage_error(source(config)):
            return image_folder.read(paths, config, keep_sizes or config.patch_size is not None)
    for flag, value in (("--image-size", config.image_size), ("--skip-broken", config.skip_broken)):
        if value:
            raise UsageError(f"{flag}: applies only to a folder of pictures, which --data does not name")
    if paths:
        return array_files.read(next(iter(paths.values())), config)
    if config.data is None and config.noisy is None:
        data = lookup(DATASETS, config.dataset, "--dataset")()
    if data is None:
        raise UsageError("data: the images were Python arrays; pass them again: dae.train(config, data=images)")
    return array_files.from_memory(data, config)


def _holds_pictures(role: str | None, path: Path) -> bool:
    """Return whether `path` is a folder of pictures or, if what it holds is noisy, a picture."""
    if path.is_dir():
        return role is not None or not array_files.idx_files(path)
    return role == NOISY and path.suffix.lower() in pictures.SUFFIXES


def _complete(images: Mapping[str, Images], config: RunConfig, name: str) -> tuple[dict[str, Images], dict[str, str]]:
    """Return training, validation and test images, and where those came from that the data set does not split off."""
    train, origins = images[TRAIN], {}
    if TEST in images:
        test = images[TEST]
    elif config.only_noisy and (len(train) == 1 or not Path(str(config.noisy)).is_dir()):
        test = train  # of a single picture or array, nothing is withheld
        origins[TEST] = ", those to train on"
    else:
        # Drawn by a fixed seed, so that runs with different seeds have the same test images. RandomState's permutations
        # are the same in every version of NumPy.
        shuffled = train.take(np.random.RandomState(0).permutation(len(train)))
        count = min(MAX_TEST, max(1, len(train) // 10))
        test, train = shuffled[:count], shuffled[count:]
        origins[TEST] = ", drawn from the others by a fixed seed"
    if not len(train):
        raise UsageError(f"{name}: expected at least two images, one to train and one to test on, got one")
    pool = images.get(VALIDATION, train)
    default = len(pool) if VALIDATION in images else min(MAX_VALIDATION, len(pool) // 10)
    available = len(pool) - (VALIDATION not in images)  # one remains to train on
    count = default if config.validation_examples is None else config.validation_examples
    if count > available:
        raise UsageError(f"--validation-examples: {count} exceeds the {available} images available")
    validation = pool[len(pool) - count :]
    if VALIDATION not in images:
        train = train[: len(train) - count]
        origins[VALIDATION] = ", the last of those to train on" if count else ""
    if config.train_examples is not None and len(train) < config.train_examples:
        origins[TRAIN] = f", fewer than --train-examples {config.train_examples}"
    train = train[: config.train_examples]
    return {TRAIN: train, VALIDATION: validation, TEST: test}, origins


def _check_same_kind(splits: Mapping[str, Images], config: RunConfig, name: str) -> None:
    kinds = {}
    for split, images in splits.items():
        shape = f"{images.channels} channels" if config.patch_size else f"shape {images.image_shape}"
        kinds[f"{shape} and type {images.dtype}"] = split
    if len(kinds) > 1:
        got = " and ".join(f"{kind} ({split})" for kind, split in kinds.items())
        raise UsageError(f"{name}: expected images of one kind, got {got}")
    smallest = splits[TRAIN].shapes.min()
    if config.patch_size is not None and smallest < config.patch_size:
        raise UsageError(f"--patch-size: {config.patch_size} exceeds the smallest side of the images, {smallest}")


def _check_values(splits: Mapping[str, Images], config: RunConfig, name: str) -> None:
    value_range = splits[TEST].value_range
    # In the precision of the pixels, of which none exceeds --value-range 0 0.1 by its rounding.
    low, high = np.float32(value_range.black), np.float32(value_range.white)
    brightest = 0.0
    for split, images in splits.items():
        if len(images):
            brightest = max(brightest, float(images.clean.max()))
        if not images.has_clean:
            for index, (height, width) in enumerate(images.shapes):
                with as_usage_error(f"{name}: {split}"):
                    values.check(images[index : index + 1].rows.reshape(1, height, width, -1), value_range)
            continue
        checked = {"values": images.clean, "noisy values": images.pixels[..., images.channels :]}
        for kind, pixels in checked.items():
            if not pixels.size:  # no images of the split, or no noisy ones
                continue
            least, most = pixels.min(), pixels.max()
            is_unlimited = kind == "noisy values" and not config.clip_noise and np.isfinite([least, most]).all()
            if not (low <= least <= most <= high or is_unlimited):  # always of NaN
                raise UsageError(
                    f"{name}: {split} has {kind} from {least:g} to {most:g}, but black is {low:g} and white {high:g}; "
                    "--value-range sets others, and --no-clip-noise allows any finite noisy ones"
                )
    if config.value_range is None:
        warn_if_nearly_black(brightest, value_range, f"{name}: ")
