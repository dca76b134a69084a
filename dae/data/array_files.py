"""Images from array files: NumPy's .npz and .npy, and IDX, MNIST's own format, plain or gzipped.

Data files need not be trusted. Pickled objects are refused, and memory stays bounded: what a file claims of its size is
compared with its actual size before anything is allocated, and pixels are read in blocks. Labels are ignored.
"""

import contextlib
import gzip
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dae.data import storage
from dae.errors import UsageError, as_usage_error


class RawImages(NamedTuple):
    """Images, uint8 [N, H, W, C], as read: training and test images, if any, and notes for the user."""

    train: np.ndarray
    test: np.ndarray | None
    notes: list[str]


# The names of MNIST's files and of those of its many successors: train-images-idx3-ubyte, train-images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...
    def tell(self) -> int: ...


def read_npz(path: Path) -> RawImages:
    """Read an .npz file: arrays x_train and, optionally, x_test, as Keras names them, or one array of any name.

    Raises UsageError, as all functions here, for any other or damaged file.
    """
    with _errors_of(path, ".npz file"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if "x_train" in names:
            names = [name for name in ("x_train", "x_test") if name in names]
        elif len(names) != 1:
            raise UsageError(
                f"expected the arrays x_train and, optionally, x_test, or one array, got {', '.join(names) or 'none'}"
            )
        arrays: list[np.ndarray] = []
        notes: list[str] = []
        for name in names:
            with archive.open(f"{name}.npy") as file:
                arrays.append(_npy(file, archive.getinfo(f"{name}.npy").file_size, f"{name}: ", notes))
    return RawImages(arrays[0], arrays[1] if len(arrays) > 1 else None, notes)


def read_npy(path: Path) -> RawImages:
    """Read an .npy file, which has no test images."""
    notes: list[str] = []
    with _errors_of(path, ".npy file"), open(path, "rb") as file:
        return RawImages(_npy(file, path.stat().st_size, "", notes), None, notes)


def read_idx(files: list[Path]) -> RawImages:
    """Read the IDX files among `files`: training and test images, or those of a single file.

    A plain file takes precedence over the same file with .gz.
    """
    parts: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (path.suffix == ".gz", path)):
        match = IDX_NAME.fullmatch(path.name)
        if match is None:
            continue
        part = "train" if match[1] == "train" else "test"
        if part in parts and path.name != parts[part].name + ".gz":
            raise UsageError(f"--data: {path.parent}: has both {parts[part].name} and {path.name}; keep only one")
        parts.setdefault(part, path)
    images = [_idx(parts[part]) for part in ("train", "test") if part in parts]
    return RawImages(images[0], images[1] if len(images) > 1 else None, [])


def check_shape(shape: tuple[int, ...], name: str = "") -> None:
    """Raise UsageError unless `shape` is [N, H, W] or [N, H, W, C] with N >= 1, H and W >= 11 and C 1 or 3."""
    if len(shape) not in (3, 4) or shape[0] < 1 or min(shape[1:3]) < 11 or shape[3:] not in ((), (1,), (3,)):
        raise UsageError(
            f"{name}expected shape [N, H, W] or [N, H, W, C] with N >= 1, H and W >= 11 (the window of SSIM) and "
            f"C 1 or 3, got {shape}"
        )


def _npy(file: _Readable, size: int, name: str, notes: list[str]) -> np.ndarray:
    """Read images in the .npy format from a file of `size` bytes."""
    magic = np.lib.format.read_magic(file)
    if magic not in _NPY_HEADERS:
        raise UsageError(f"{name}expected .npy format 1.0 or 2.0, got {magic}")
    shape, fortran_order, dtype = _NPY_HEADERS[magic](file)
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise UsageError(f"{name}expected uint8 (0 black to 255 white) or floats (0 to 1), got {dtype}")
    check_shape(shape, name)
    if dtype != np.uint8:
        notes.append(f"{name}{dtype} in [0, 1], rounded to 256 levels")
    _check_size(shape, dtype.itemsize, size - file.tell(), name)
    if not fortran_order:
        return _read_blocks(file, shape, dtype, name)
    if math.prod(shape) * dtype.itemsize > storage.IN_MEMORY:
        raise UsageError(f"{name}too large for an array in Fortran order; save np.ascontiguousarray of it")
    whole = np.frombuffer(file.read(), dtype).reshape(shape, order="F")
    return storage.materialize(_with_channels(shape), [_pixels(whole, 0, name)])


def _idx(path: Path) -> np.ndarray:
    """Read one IDX file. Source of the format: yann.lecun.com/exdb/mnist."""
    gzipped = path.suffix == ".gz"
    with _errors_of(path, "IDX file"), gzip.open(path) if gzipped else open(path, "rb") as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or dimensions not in (3, 4):
            raise UsageError("expected an IDX file of images (uint8, 3 or 4 dimensions)")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        check_shape(shape)
        if not gzipped:
            _check_size(shape, 1, path.stat().st_size - file.tell(), "")
        return _read_blocks(file, shape, np.dtype(np.uint8), "")


def _check_size(shape: tuple[int, ...], itemsize: int, size: int, name: str) -> None:
    if math.prod(shape) * itemsize != size:
        raise UsageError(f"{name}shape {shape} does not match the size of the file")


def _read_blocks(file: _Readable, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """Read images of `shape` from the current position of `file` to its end."""
    image_bytes = math.prod(shape[1:]) * dtype.itemsize
    block_images = max(1, storage.BLOCK // image_bytes)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], block_images):
            count = min(block_images, shape[0] - start)
            content = file.read(count * image_bytes)
            if len(content) != count * image_bytes:
                raise EOFError(f"ends within image {start + len(content) // image_bytes + 1} of {shape[0]}")
            yield _pixels(np.frombuffer(content, dtype).reshape(count, *shape[1:]), start, name)
        if file.read(1):
            raise ValueError(f"continues after image {shape[0]}, the last")

    return storage.materialize(_with_channels(shape), blocks())


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (*shape, 1)


def _pixels(images: np.ndarray, start: int, name: str) -> np.ndarray:
    """Return images, the first of which is number `start` of the file, as uint8 [N, H, W, C]."""
    if images.dtype != np.uint8:
        wrong = ~((images >= 0) & (images <= 1))  # true for NaN
        if wrong.any():
            index = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])
            value = images[index][wrong[index]].flat[0]
            raise UsageError(
                f"{name}expected floats from 0 to 1, got {value:g} in image {start + index + 1}; "
                "divide by 255 or save as uint8 if white is 255"
            )
        images = np.rint(images.astype(np.float32) * 255).astype(np.uint8)
    return images.reshape(_with_channels(images.shape))


@contextlib.contextmanager
def _errors_of(path: Path, kind: str) -> Iterator[None]:
    """Raise errors of reading a file as a UsageError in one line with its name."""
    if not path.exists():
        raise UsageError(f"--data: {path}: no such file")
    with as_usage_error(
        f"--data: {path}", f"not a readable {kind}", Exception
    ):  # zipfile, gzip, NumPy raise many types
        yield
