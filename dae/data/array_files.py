"""Images from arrays: NumPy's .npz and .npy, IDX (MNIST's own format, plain or gzipped), and arrays in memory.

Data files need not be trusted. Pickled objects are rejected, and memory stays bounded: the size that a file claims is
compared with its actual size before anything is allocated, and pixels are read in blocks. Labels are ignored.
"""

import contextlib
import gzip
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dae.config import RunConfig
from dae.data import layout, storage
from dae.data.images import Images, RawSplits, check_shape, rescaled, to_grey
from dae.data.values import ValueRange
from dae.errors import UsageError, as_usage_error

# The names of MNIST's files and of those of its many successors: train-images-idx3-ubyte, train-images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")
_File = IO[bytes] | BufferedIOBase
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Array(NamedTuple):
    """An array, or a file whose next bytes are the array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: np.ndarray | _File


def read(path: Path, config: RunConfig) -> RawSplits:
    """Read the images of an .npz, .npy or IDX file, or of a folder of IDX files.

    The arrays of an .npz file are named as Keras does, x_train and x_test, or by split and role, such as noisy_train
    and clean_train (dae/data/layout.py); a single array may have any name. If y is an array of images, x is noisy and
    y clean. Raises UsageError for a damaged or unsupported file.
    """
    # zipfile, gzip and NumPy raise many types.
    with as_usage_error(f"--data: {path}", "not readable", Exception), contextlib.ExitStack() as stack:
        return _images(_open(path, stack), config)


def from_memory(data: np.ndarray | Mapping[str, np.ndarray], config: RunConfig) -> RawSplits:
    """Return the images of an array, or of several with names as in an .npz file, or of what NumPy converts to one."""
    named = data if isinstance(data, Mapping) else {"": data}
    with as_usage_error("data", "expected arrays", ValueError, TypeError):
        arrays = {str(name): np.asarray(array) for name, array in named.items()}
        return _images({name: _Array(array.shape, array.dtype, array) for name, array in arrays.items()}, config)


def idx_files(folder: Path) -> list[Path]:
    """Return the IDX files of images in a folder, sorted. Raises UsageError for a folder that cannot be read."""
    with as_usage_error(f"--data: {folder}", "cannot be read", OSError):
        return sorted(path for path in folder.iterdir() if IDX_NAME.fullmatch(path.name))


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, _Array]:
    """Open the files of `read`, which `stack` closes, and return their arrays by name; a single one may have none."""
    if path.suffix == ".npy":
        return {"": _npy(stack.enter_context(open(path, "rb")), path.stat().st_size)}
    arrays: dict[str, _Array] = {}
    if path.suffix == ".npz":
        archive = stack.enter_context(zipfile.ZipFile(path))
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                with as_usage_error(name):
                    arrays[name] = _npy(stack.enter_context(archive.open(member)), member.file_size)
        return arrays
    paths = idx_files(path) if path.is_dir() else [path]
    for idx_path in paths:
        match = IDX_NAME.fullmatch(idx_path.name)
        if match is None:
            raise UsageError("expected a folder, or an .npz, .npy or IDX file (such as train-images-idx3-ubyte)")
        split = layout.TRAIN if len(paths) == 1 or match[1] == "train" else layout.TEST
        if split in arrays:
            raise UsageError(f"has two files of {split} images, such as {idx_path.name}; keep only one")
        opened = (gzip.open if match[2] else open)(idx_path, "rb")
        arrays[split] = _idx(stack.enter_context(opened))
    return arrays


def _images(arrays: Mapping[str, _Array], config: RunConfig) -> RawSplits:
    # Labels, and whatever else is stored beside the images, have fewer dimensions.
    chosen = {name: array for name, array in arrays.items() if len(array.shape) >= 3 or len(arrays) == 1}
    if not chosen:
        raise UsageError("expected images, [N, H, W] or [N, H, W, C], got none")
    notes = [f"not read: {name}, of shape {array.shape}" for name, array in arrays.items() if name not in chosen]
    images = {}
    for split, names in layout.divide(_meanings(chosen)).items():
        if len(names) > 1:
            raise UsageError(
                "expected one array of images, or several with names such as x_train and x_test, or noisy and clean, "
                f"got {', '.join(name for name, _ in names)}"
            )
        ((clean, noisy),) = names
        images[split] = _read({name: chosen[name] for name in (clean, noisy) if name is not None}, config)
        if noisy is not None:
            notes.append(f"{split} pairs: {noisy} is noisy, {clean} is clean")
    return images, notes


def _meanings(names: Mapping[str, _Array]) -> dict[str, layout.Meaning]:
    meanings = {name: layout.parse(name)._replace(key="") for name in names}
    # Keras calls the input of a network x and its target y.
    axes = {name: set(re.findall(r"[a-z]+", name.lower())) & {"x", "y"} for name in names}
    if {"y"} in axes.values():
        for name, axis in axes.items():
            role = {"x": layout.NOISY, "y": layout.CLEAN}.get("".join(axis))
            meanings[name] = meanings[name]._replace(role=meanings[name].role or role)
    return meanings


def _read(arrays: Mapping[str, _Array], config: RunConfig) -> Images:
    """Read an array of clean images, or of a clean and a noisy one the pairs; grey if `config` says so."""
    shapes, dtypes, ranges = [], [], []
    for name, array in arrays.items():
        with as_usage_error(name) if name else contextlib.nullcontext():
            check_shape(array.shape)
            dtypes.append(_stored_type(array.dtype))
            ranges.append(ValueRange.requested(config.value_range, array.dtype))
        channels = 1 if config.grey else math.prod(array.shape[3:])
        shapes.append((*array.shape[:3], channels))
    dtype, shape = np.result_type(*dtypes), shapes[0]
    if len(set(shapes)) > 1 or len({kept.kind for kept in dtypes}) > 1:
        got = " and ".join(f"{shape} {kept}" for shape, kept in zip(shapes, dtypes, strict=True))
        raise UsageError(f"expected clean and noisy images of equal shapes and types, got {got}")

    def converted(block: np.ndarray, kept: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):  # to infinity, which datasets.py rejects
            pixels = block.astype(kept, copy=False).reshape(*block.shape[:3], -1)
        return rescaled(to_grey(pixels) if pixels.shape[3] > shape[3] else pixels, dtype)

    length = max(
        1, storage.BLOCK // max(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays.values())
    )
    blocks = (
        np.concatenate(list(map(converted, parts, dtypes)), axis=-1)
        for parts in zip(*(_blocks(array, length) for array in arrays.values()), strict=True)
    )
    stored = (*shape[:3], len(arrays) * shape[3])
    pixels = storage.materialize(stored, blocks, dtype)
    return Images(pixels, is_paired=len(arrays) == 2, given_range=ranges[dtypes.index(dtype)])


def _stored_type(dtype: np.dtype) -> np.dtype:
    return np.dtype(dtype.type if dtype.type in (np.uint8, np.uint16) else np.float32)  # in this machine's byte order


def npy_header(file: _File, size: int) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Return the shape and type of the .npy array in a file of `size` bytes, and whether it is in Fortran order.

    Leaves `file` at its first value. Raises UsageError, ValueError or KeyError for another size or format.
    """
    shape, fortran_order, dtype = _NPY_HEADERS[np.lib.format.read_magic(file)](file)
    # Labels can be Python objects; they are not read.
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size - file.tell():
        raise UsageError(f"shape {shape} does not match the size of the file")
    return shape, dtype, fortran_order


def _npy(file: _File, size: int) -> _Array:
    shape, dtype, fortran_order = npy_header(file, size)
    if fortran_order and len(shape) > 2:
        raise UsageError("an array in Fortran order; save np.ascontiguousarray of it")
    return _Array(shape, dtype, file)


def _idx(file: _File) -> _Array:
    # Source of the format: yann.lecun.com/exdb/mnist.
    zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
    if zeros != 0 or kind != 8 or dimensions not in (3, 4):
        raise UsageError("expected an IDX file of images (uint8, 3 or 4 dimensions)")
    return _Array(struct.unpack(f">{dimensions}I", file.read(4 * dimensions)), np.dtype(np.uint8), file)


def _blocks(array: _Array, length: int) -> Iterator[np.ndarray]:
    """Yield an array in blocks of `length` images. Raises ValueError if a file does not end with the last image."""
    file, dtype = array.values, array.dtype
    for start in range(0, array.shape[0], length):
        if isinstance(file, np.ndarray):
            yield file[start : start + length]
        else:
            shape = (min(length, array.shape[0] - start), *array.shape[1:])
            yield np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    if not isinstance(file, np.ndarray) and file.read(1):
        raise ValueError(f"continues after image {array.shape[0]}, the last")
