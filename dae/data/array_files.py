"""Images from arrays: NumPy's .npz and .npy, and IDX, MNIST's own format, plain or gzipped; or arrays in memory.

Data files need not be trusted. Pickled objects are refused, and memory stays bounded: what a file claims of its size is
compared with its actual size before anything is allocated, and pixels are read in blocks. Labels are ignored.
"""

import contextlib
import gzip
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dae.config import RunConfig
from dae.data import layout, storage
from dae.data.images import Images, Parts, pair, to_grey
from dae.errors import UsageError, as_usage_error, shown

# The names of MNIST's files and of those of its many successors: train-images-idx3-ubyte, train-images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...
    def tell(self) -> int: ...


class _Array(NamedTuple):
    """An array that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]
    """Returns the array in parts, [n, ...], in order."""


def read_npz(path: Path, config: RunConfig) -> Parts:
    """Read the images of an .npz file: clean ones, or pairs, of one part or of several.

    Arrays are named as Keras does, x_train and x_test; by part and role, such as noisy_train and clean_train
    (dae/data/layout.py); or, if there is only one, at will. If y is an array of images, x is noisy and y clean. Raises
    UsageError, as all functions here, for any other or damaged file.
    """
    with _errors_of(path, ".npz file"), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        arrays = {}
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                file = stack.enter_context(archive.open(member))
                with as_usage_error(name):
                    arrays[name] = _npy(file, member.file_size)
        return _images(arrays, config)


def read_npy(path: Path, config: RunConfig) -> Parts:
    """Read an .npy file, which has only one part."""
    with _errors_of(path, ".npy file"), open(path, "rb") as file:
        return _images({"": _npy(file, path.stat().st_size)}, config)


def read_idx(files: list[Path], config: RunConfig) -> Parts:
    """Read the IDX files among `files`: training and test images, or those of a single file.

    A plain file takes precedence over the same file with .gz.
    """
    found: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (path.suffix == ".gz", path)):
        match = IDX_NAME.fullmatch(path.name)
        if match is None:
            continue
        part = layout.TRAIN if match[1] == "train" else layout.TEST
        if part in found and path.name != found[part].name + ".gz":
            raise UsageError(f"--data: {path.parent}: has both {found[part].name} and {path.name}; keep only one")
        found.setdefault(part, path)
    if list(found) == [layout.TEST]:
        found = {layout.TRAIN: found[layout.TEST]}
    images = {}
    for part, path in found.items():
        with _errors_of(path, "IDX file"), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            images[part] = _read(_idx(file, path), "", config)
    return Parts(images, [])


def from_memory(data: np.ndarray | Mapping[str, np.ndarray], config: RunConfig) -> Parts:
    """Return the images of an array, or of several with names as in an .npz file."""
    arrays = data if isinstance(data, Mapping) else {"": data}

    def unread(array: np.ndarray) -> _Array:
        length = max(1, storage.BLOCK // max(1, array[:1].nbytes))
        return _Array(
            array.shape,
            array.dtype,
            lambda: (array[start : start + length] for start in range(0, len(array), length)),
        )

    with as_usage_error("data"):
        for name, array in arrays.items():
            if not isinstance(name, str):
                raise UsageError(f"expected names of arrays, such as 'x_train', got {shown(name)}")
            if not isinstance(array, np.ndarray):
                raise UsageError(
                    f"{name + ': ' if name else ''}expected a NumPy array, got {type(array).__name__}"
                    + ("; paths belong in RunConfig(data=...)" if isinstance(array, str | os.PathLike) else "")
                )
        return _images({name: unread(np.atleast_1d(array)) for name, array in arrays.items()}, config)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise UsageError unless `shape` is [N, H, W] or [N, H, W, C] with N >= 1, H and W >= 11 and C 1 or 3."""
    if len(shape) not in (3, 4) or shape[0] < 1 or min(shape[1:3]) < 11 or shape[3:] not in ((), (1,), (3,)):
        raise UsageError(
            f"expected shape [N, H, W] or [N, H, W, C] with N >= 1, H and W >= 11 (the window of SSIM) and "
            f"C 1 or 3, got {shape}"
        )


def _images(arrays: Mapping[str, _Array], config: RunConfig) -> Parts:
    """Choose the arrays that hold images by their names, and read them."""
    # Labels, and whatever else is stored beside the images, have fewer dimensions.
    chosen = {name: array for name, array in arrays.items() if len(array.shape) >= 3 or len(arrays) == 1}
    if not chosen:
        found = [f"{name} of shape {array.shape} and type {array.dtype}" for name, array in arrays.items()]
        raise UsageError(f"expected images, [N, H, W] or [N, H, W, C], got {', '.join(found) or 'no array'}")
    places = {name: layout.of_name(name)._replace(key="") for name in chosen}
    axes = {name: set(re.findall(r"[a-z]+", name.lower())) & {"x", "y"} for name in chosen}
    if {"y"} in axes.values():  # Keras's names for what goes into a network and what should come out
        for name, axis in axes.items():
            role = {"x": layout.NOISY, "y": layout.CLEAN}.get("".join(axis))
            places[name] = places[name]._replace(role=places[name].role or role)
    notes = [f"not read: {name}, of shape {array.shape}" for name, array in arrays.items() if name not in chosen]
    images = {}
    for part, names in layout.divide(places).items():
        if len(names) > 1:
            raise UsageError(
                "expected one array of images, or several with names such as x_train and x_test, or noisy and clean, "
                f"got {', '.join(name for name, _ in names)}"
            )
        ((clean, noisy),) = names
        images[part] = _read(chosen[clean], clean, config)
        if noisy is not None:
            images[part] = pair(images[part], _read(chosen[noisy], noisy, config, is_noisy=True))
            notes.append(f"{part} pairs: {noisy} is noisy, {clean} is clean")
    return Parts(images, notes)


def _read(array: _Array, name: str, config: RunConfig, is_noisy: bool = False) -> Images:
    """Read an array of images; their values must be in the configured range, and those of noisy ones if clipped."""
    with as_usage_error(name) if name else contextlib.nullcontext():
        if array.dtype.hasobject:
            raise UsageError("expected an array of numbers, got Python objects")
        check_shape(array.shape)
        dtype = _stored_type(array.dtype, config.value_range is not None)
        low, high = config.value_range or ((0, 1) if dtype == np.float32 else (-math.inf, math.inf))
        if is_noisy and not config.clip_noise:
            low, high = -math.inf, math.inf
        to_grey_too = config.grey and array.shape[3:] == (3,)
        shape = (*array.shape[:3], 1 if to_grey_too else (*array.shape, 1)[3])

        def blocks() -> Iterator[np.ndarray]:
            count = 0
            for block in array.blocks():
                with np.errstate(over="ignore"):  # to infinity, which is refused
                    block = block.astype(dtype, copy=False)
                block = block.reshape(len(block), *array.shape[1:3], -1)
                if dtype == np.float32 or config.value_range is not None:
                    _check_values(block, low, high, count, is_noisy)
                count += len(block)
                yield to_grey(block) if to_grey_too else block

        return Images(storage.materialize(shape, blocks(), dtype))


def _stored_type(dtype: np.dtype, has_value_range: bool) -> np.dtype:
    """Return the type in which pixels are kept: that of the file, or float32 for other floats and integers."""
    if dtype.type in (np.uint8, np.uint16):
        return np.dtype(dtype.type)  # in this machine's byte order
    if (dtype.kind == "f" and dtype.itemsize <= 8) or (dtype.kind in "iub" and has_value_range):
        return np.dtype(np.float32)
    raise UsageError(
        f"expected uint8, uint16, or floats from 0 (black) to 1 (white), got {dtype}; add --value-range with the "
        "values of black and white"
    )


def _check_values(block: np.ndarray, low: float, high: float, start: int, is_noisy: bool) -> None:
    """Raise UsageError for a value that is not finite and in [low, high]; `start` is the number of the first image."""
    wrong = ~((block >= low) & (block <= high) & np.isfinite(block))
    if wrong.any():
        index = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])
        value = block[index][wrong[index]].flat[0]
        raise UsageError(
            f"expected values from {low:g} (black) to {high:g} (white), got {value:g} in image {start + index + 1}; "
            "--value-range sets others" + (", and --no-clip-noise allows any in noisy images" if is_noisy else "")
        )


def npy_header(file: _Readable, size: int) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Return the shape and type of the .npy array in a file of `size` bytes, and whether it is in Fortran order.

    Leaves `file` at its first value. Raises UsageError for another version or size, and ValueError if it is no array.
    """
    magic = np.lib.format.read_magic(file)
    if magic not in _NPY_HEADERS:
        raise UsageError(f"expected .npy format 1.0 or 2.0, got {magic}")
    shape, fortran_order, dtype = _NPY_HEADERS[magic](file)
    # Labels can be Python objects; they are not read.
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size - file.tell():
        raise UsageError(f"shape {shape} does not match the size of the file")
    return shape, dtype, fortran_order


def _npy(file: _Readable, size: int) -> _Array:
    shape, dtype, fortran_order = npy_header(file, size)
    if not fortran_order or len(shape) < 2:
        return _Array(shape, dtype, lambda: _blocks(file, shape, dtype))
    if math.prod(shape) * dtype.itemsize > storage.IN_MEMORY:
        raise UsageError("too large for an array in Fortran order; save np.ascontiguousarray of it")
    return _Array(shape, dtype, lambda: iter([np.frombuffer(file.read(), dtype).reshape(shape, order="F")]))


def _idx(file: _Readable, path: Path) -> _Array:
    """Read the header of an IDX file. Source of the format: yann.lecun.com/exdb/mnist."""
    zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
    if zeros != 0 or kind != 8 or dimensions not in (3, 4):
        raise UsageError("expected an IDX file of images (uint8, 3 or 4 dimensions)")
    shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    if path.suffix != ".gz" and math.prod(shape) != path.stat().st_size - file.tell():
        raise UsageError(f"shape {shape} does not match the size of the file")
    return _Array(shape, np.dtype(np.uint8), lambda: _blocks(file, shape, np.dtype(np.uint8)))


def _blocks(file: _Readable, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the images of `shape` from the current position of `file` to its end, in blocks."""
    image_bytes = math.prod(shape[1:]) * dtype.itemsize
    block_images = max(1, storage.BLOCK // image_bytes)
    for start in range(0, shape[0], block_images):
        count = min(block_images, shape[0] - start)
        content = file.read(count * image_bytes)
        if len(content) != count * image_bytes:
            raise EOFError(f"ends within image {start + len(content) // image_bytes + 1} of {shape[0]}")
        yield np.frombuffer(content, dtype).reshape(count, *shape[1:])
    if file.read(1):
        raise ValueError(f"continues after image {shape[0]}, the last")


@contextlib.contextmanager
def _errors_of(path: Path, kind: str) -> Iterator[None]:
    """Raise errors of reading a file as a UsageError in one line with its name."""
    with as_usage_error(
        f"--data: {path}", f"not a readable {kind}", Exception
    ):  # zipfile, gzip, NumPy raise many types
        yield
