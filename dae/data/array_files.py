"""Images from arrays: NumPy's .npz and .npy, IDX (MNIST's own format, plain or gzipped), and arrays in memory.

Data files need not be trusted: pickled objects are rejected. Arrays of .npy files are memory-mapped. Labels are
ignored.
"""

import contextlib
import gzip
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dae.config import RunConfig
from dae.data import layout, storage
from dae.data.images import Images, RawSplits, as_batch, check_sides, to_grey
from dae.data.values import ValueRange
from dae.errors import UsageError, as_usage_error

SUFFIXES = (".npy", ".npz")
# The names of MNIST's files and of those of its many successors: train-images-idx3-ubyte, train-images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")

Arrays = Mapping[str, np.ndarray]


def read(path: Path, config: RunConfig) -> RawSplits:
    """Read the images of an .npz, .npy or IDX file, or of a folder of IDX files.

    The arrays of an .npz file are named as Keras does, x_train and x_test, or by split and role, such as noisy_train
    and clean_train (dae/data/layout.py); a single array may have any name. If y is an array of images, x is noisy and
    y clean. Raises UsageError for a damaged or unsupported file.
    """
    flag = "--noisy" if config.only_noisy else "--data"
    with as_usage_error(f"{flag}: {path}", "not readable", Exception):  # zipfile, gzip and NumPy raise many types
        return _images(load(path) if path.suffix in SUFFIXES else _idx_arrays(path), config)


def from_memory(data: np.ndarray | Mapping[str, np.ndarray], config: RunConfig) -> RawSplits:
    """Return the images of an array, or of several with names as in an .npz file, or of what NumPy converts to one."""
    named = data if isinstance(data, Mapping) else {"": data}
    with as_usage_error("data", "expected arrays", ValueError, TypeError):
        return _images({str(name): np.asarray(array) for name, array in named.items()}, config)


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name, or that of an .npy file, memory-mapped, which has no name.

    Raises what NumPy raises.
    """
    if path.suffix.lower() == ".npy":
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # np.load leaks the file if it fails
        return {name: array for name, array in archive.items() if isinstance(array, np.ndarray)}


def idx_files(folder: Path) -> list[Path]:
    """Return the IDX files of images in a folder, sorted. Raises UsageError for a folder that cannot be read."""
    with as_usage_error(f"--data: {folder}", "cannot be read", OSError):
        return sorted(path for path in folder.iterdir() if IDX_NAME.fullmatch(path.name))


def _idx_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the images of an IDX file, or of those in a folder, by split."""
    arrays: dict[str, np.ndarray] = {}
    paths = idx_files(path) if path.is_dir() else [path]
    for idx_path in paths:
        match = IDX_NAME.fullmatch(idx_path.name)
        if match is None:
            raise UsageError("expected a folder, or an .npz, .npy or IDX file (such as train-images-idx3-ubyte)")
        split = layout.TRAIN if len(paths) == 1 or match[1] == "train" else layout.TEST
        if split in arrays:
            raise UsageError(f"has two files of {split} images, such as {idx_path.name}; keep only one")
        arrays[split] = _idx(idx_path, is_packed=match[2] is not None)
    return arrays


def _idx(path: Path, is_packed: bool) -> np.ndarray:
    """Read an IDX file, or map it into memory if it is not packed. Source of the format: yann.lecun.com/exdb/mnist."""
    with (gzip.open if is_packed else open)(path, "rb") as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or dimensions not in (3, 4):
            raise UsageError("expected an IDX file of images (uint8, 3 or 4 dimensions)")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        pixels = np.frombuffer(file.read(), np.uint8) if is_packed else np.memmap(path, np.uint8, "r", file.tell())
    if len(pixels) != math.prod(shape):
        raise UsageError(f"shape {shape} does not match the size of the file")
    return pixels.reshape(shape if dimensions == 4 else (*shape, 1))


def _images(arrays: Arrays, config: RunConfig) -> RawSplits:
    """Return the images among arrays."""
    # Labels, and whatever else is stored beside the images, have fewer dimensions.
    chosen = [name for name, array in arrays.items() if array.ndim >= (3 if config.axes is None else len(config.axes))]
    notes = [f"not read: {name}, of shape {array.shape}" for name, array in arrays.items() if name not in chosen]
    if not chosen:
        got = ", ".join(f"{name} {array.shape}".strip() for name, array in arrays.items()) or "none"
        raise UsageError(f"expected images, {config.axes or '[N, H, W] or [N, H, W, C]'}, got {got}")
    images = {}
    for split, names in layout.divide(_meanings(chosen), config.only_noisy).items():
        if len(names) > 1:
            raise UsageError(
                "expected one array of images, or several with names such as x_train and x_test, or noisy and clean, "
                f"got {', '.join(name for name, _ in names)}"
            )
        ((clean, noisy),) = names
        images[split] = _read({name: arrays[name] for name in (clean, noisy) if name is not None}, config)
        if noisy is not None:
            notes.append(f"{split} pairs: {noisy} is noisy, {clean} is clean")
    return images, notes


def _meanings(names: Iterable[str]) -> dict[str, layout.Meaning]:
    meanings = {name: layout.parse(name)._replace(key="") for name in names}
    # Keras calls the input of a network x and its target y.
    axes = {name: set(re.findall(r"[a-z]+", name.lower())) & {"x", "y"} for name in names}
    if {"y"} in axes.values():
        for name, axis in axes.items():
            role = {"x": layout.NOISY, "y": layout.CLEAN}.get("".join(axis))
            meanings[name] = meanings[name]._replace(role=meanings[name].role or role)
    return meanings


def _read(arrays: Arrays, config: RunConfig) -> Images:
    """Read an array of clean images, or of a clean and a noisy one the pairs; grey if `config` says so."""
    batches, dtypes, ranges = [], [], []
    for name, array in arrays.items():
        with as_usage_error(name) if name else contextlib.nullcontext():
            batches.append(as_batch(array, config.axes))
            check_sides(*batches[-1].shape[1:3])
            dtypes.append(_stored_type(array.dtype))
            ranges.append(ValueRange.requested(config.value_range, array.dtype))
    shapes = [(*batch.shape[:3], 1 if config.grey else batch.shape[3]) for batch in batches]
    dtype, (count, height, width, channels) = dtypes[0], shapes[0]
    if len(set(zip(shapes, dtypes, strict=True))) > 1:
        got = " and ".join(f"{shape} {kept}" for shape, kept in zip(shapes, dtypes, strict=True))
        raise UsageError(f"expected clean and noisy images of equal shapes and types, got {got}")

    def converted(block: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # to infinity, which datasets.py rejects
            pixels = block.astype(dtype, copy=False)
        return to_grey(pixels) if pixels.shape[3] > channels else pixels

    length = max(1, storage.BLOCK // max(batch[0].nbytes for batch in batches))
    blocks = (
        np.concatenate([converted(batch[start : start + length]) for batch in batches], axis=-1)
        for start in range(0, count, length)
    )
    pixels = storage.materialize((count, height, width, len(batches) * channels), blocks, dtype)
    is_paired = len(batches) == 2
    return Images(pixels, is_paired, given_range=ranges[0], has_clean=is_paired or not config.only_noisy)


def _stored_type(dtype: np.dtype) -> np.dtype:
    return np.dtype(dtype.type if dtype.type in (np.uint8, np.uint16) else np.float32)  # in this machine's byte order
