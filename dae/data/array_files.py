"""Images from arrays: NumPy's .npz and .npy, IDX (MNIST's own format, plain or gzipped), and arrays in memory.

Data files need not be trusted: pickled objects are rejected, and so is a file that claims more values than it holds.
Arrays of .npy files are memory-mapped. Labels are ignored.
"""

import contextlib
import gzip
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from dae.config import RunConfig
from dae.data import layout, storage
from dae.data.images import Images, RawSplits, as_batch, check_sides, rescaled, to_grey
from dae.data.values import ValueRange
from dae.errors import UsageError, as_usage_error

SUFFIXES = (".npy", ".npz")
# The names of MNIST's files and of those of its many successors: train-images-idx3-ubyte, train-images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")
# Deflate packs at most 1032 bytes into one: zlib.net/zlib_tech.html
_DEFLATE = 1032
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Arrays = Mapping[str, np.ndarray]


def read(path: Path, config: RunConfig) -> RawSplits:
    """Read the images of an .npz, .npy or IDX file, or of a folder of IDX files.

    The arrays of an .npz file are named as Keras does, x_train and x_test, or by split and role, such as noisy_train
    and clean_train (dae/data/layout.py); a single array may have any name. If y is an array of images, x is noisy and
    y clean. Raises UsageError for a damaged or unsupported file.
    """
    flag = "--noisy" if config.only_noisy else "--data"
    with as_usage_error(f"{flag}: {path}", "not readable", Exception):  # zipfile, gzip and NumPy raise many types
        if path.suffix in SUFFIXES:
            return _images(headers(path), config, lambda name: load(path, name))
        arrays = _idx_arrays(path)
        return _images(arrays, config, arrays.__getitem__)


def from_memory(data: np.ndarray | Mapping[str, np.ndarray], config: RunConfig) -> RawSplits:
    """Return the images of an array, or of several with names as in an .npz file, or of what NumPy converts to one."""
    named = data if isinstance(data, Mapping) else {"": data}
    with as_usage_error("data", "expected arrays", ValueError, TypeError):
        arrays = {str(name): np.asarray(array) for name, array in named.items()}
        return _images(arrays, config, arrays.__getitem__)


def headers(path: Path) -> dict[str, np.ndarray]:
    """Return arrays of the shapes and types of those in an .npy or .npz file, without their values, by name.

    The array of an .npy file has no name. Raises UsageError for an array whose size does not match its shape, and what
    NumPy and zipfile raise for damaged files.
    """
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            return {"": _header(file, path.stat().st_size)}
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                name = info.filename.removesuffix(".npy")
                with as_usage_error(name), archive.open(info) as member:
                    found[name] = _header(member, info.file_size)
    return found


def load(path: Path, name: str) -> np.ndarray:
    """Return the array of an .npy file, memory-mapped, or one of an .npz file by its name. Raises what NumPy raises."""
    if path.suffix.lower() == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # np.load leaks the file if it fails
        return archive[f"{name}.npy"]


def _header(file: IO[bytes], size: int) -> np.ndarray:
    shape, _, dtype = _NPY_HEADERS[np.lib.format.read_magic(file)](file)
    # Labels can be Python objects; they are not read.
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size - file.tell():
        raise UsageError(f"shape {shape} does not match the size of the file")
    return np.broadcast_to(np.empty((), dtype), shape)


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
    size = path.stat().st_size
    with (gzip.open if is_packed else open)(path, "rb") as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or dimensions not in (3, 4):
            raise UsageError("expected an IDX file of images (uint8, 3 or 4 dimensions)")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        if is_packed:
            values = file.read(math.prod(shape) + 1) if math.prod(shape) <= _DEFLATE * size else b""
            pixels = np.frombuffer(values, np.uint8)
        else:
            pixels = np.memmap(path, np.uint8, "r", file.tell())
    if len(pixels) != math.prod(shape):
        raise UsageError(f"shape {shape} does not match the size of the file")
    return pixels.reshape(shape if dimensions == 4 else (*shape, 1))


def _images(arrays: Arrays, config: RunConfig, load_array: Callable[[str], np.ndarray]) -> RawSplits:
    """Return the images among arrays, of which shapes and types suffice; `load_array` returns the values by name."""
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
        images[split] = _read({name: load_array(name) for name in (clean, noisy) if name is not None}, config)
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
    dtype, (count, height, width, channels) = np.result_type(*dtypes), shapes[0]
    if len(set(shapes)) > 1 or len({kept.kind for kept in dtypes}) > 1:
        got = " and ".join(f"{shape} {kept}" for shape, kept in zip(shapes, dtypes, strict=True))
        raise UsageError(f"expected clean and noisy images of equal shapes and types, got {got}")

    def converted(block: np.ndarray, kept: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):  # to infinity, which datasets.py rejects
            pixels = block.astype(kept, copy=False)
        return rescaled(to_grey(pixels) if pixels.shape[3] > channels else pixels, dtype)

    length = max(1, storage.BLOCK // max(batch[0].nbytes for batch in batches))
    blocks = (
        np.concatenate(
            [converted(batch[start : start + length], kept) for batch, kept in zip(batches, dtypes, strict=True)],
            axis=-1,
        )
        for start in range(0, count, length)
    )
    pixels = storage.materialize((count, height, width, len(batches) * channels), blocks, dtype)
    is_paired, given_range = len(batches) == 2, ranges[dtypes.index(dtype)]
    return Images(pixels, is_paired, given_range=given_range, has_clean=is_paired or not config.only_noisy)


def _stored_type(dtype: np.dtype) -> np.dtype:
    return np.dtype(dtype.type if dtype.type in (np.uint8, np.uint16) else np.float32)  # in this machine's byte order
