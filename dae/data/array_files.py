"""Images from files of arrays: NumPy's .npz and .npy, and IDX, plain or gzipped, which is MNIST's own format.

Such a file costs neither trust nor memory: pickled objects are refused, and what a file says of its size is held
against how large it is before anything is allocated. Labels are not looked at.
"""

import contextlib
import gzip
import lzma
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from dae.data import storage
from dae.errors import UsageError, first_line

# Training images, test images if there are any, and what is to be said of them.
Found = tuple[np.ndarray, np.ndarray | None, list[str]]

# The names that MNIST's files and those of its many successors have: train-images-idx3-ubyte, -images.idx3-ubyte.
IDX_NAME = re.compile(r"(?:.*[-_])?(train|t10k|test)-images[-.]idx[34]-ubyte(\.gz)?")
# MNIST, which is mostly black, packs 5-fold; the most that the formats can is 1,030-fold.
_MAX_EXPANSION = 200
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile, gzip and NumPy are known to raise for broken bytes.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,  # also zipfile's for a compression that it does not know
    SyntaxError,
    struct.error,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...
    def tell(self) -> int: ...


def read_npz(path: Path) -> Found:
    """The images of an .npz file: arrays x_train and, perhaps, x_test, as in Keras, or one array of any name.

    Raises UsageError, as all functions here, for a file of anything else and for a broken one.
    """
    with _refusing(path, ".npz file"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if "x_train" in names:
            names = [name for name in ("x_train", "x_test") if name in names]
        elif len(names) != 1:
            raise UsageError(f"has the arrays {', '.join(names) or '(none)'}; needed: x_train, perhaps x_test, or one")
        arrays: list[np.ndarray] = []
        notes: list[str] = []
        for name in names:
            with archive.open(f"{name}.npy") as file:
                size = archive.getinfo(f"{name}.npy").file_size
                arrays.append(_npy(file, size, path.stat().st_size, f"{name} ", notes))
    return arrays[0], arrays[1] if len(arrays) > 1 else None, notes


def read_npy(path: Path) -> Found:
    """The images of an .npy file, which has no test part."""
    notes: list[str] = []
    with _refusing(path, ".npy file"), open(path, "rb") as file:
        size = path.stat().st_size
        return _npy(file, size, size, "", notes), None, notes


def read_idx(files: list[Path]) -> Found:
    """The images of the IDX files among `files`: training and test images, or those of one file alone.

    A name without .gz is taken rather than the same with it.
    """
    parts: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (path.suffix == ".gz", path)):
        match = IDX_NAME.fullmatch(path.name)
        if match is None:
            continue
        part = "train" if match[1] == "train" else "test"
        if part in parts and path.name != parts[part].name + ".gz":
            raise UsageError(f"--data: {path.parent}: has {parts[part].name} and {path.name}; put aside all but one")
        parts.setdefault(part, path)
    images = [_idx(parts[part]) for part in ("train", "test") if part in parts]
    return images[0], images[1] if len(images) > 1 else None, []


def check_shape(shape: tuple[int, ...], name: str = "") -> None:
    """Raises UsageError unless `shape` is one of images."""
    if len(shape) not in (3, 4) or shape[0] < 1 or min(shape[1:3]) < 11 or shape[3:] not in ((), (1,), (3,)):
        raise UsageError(
            f"{name}has shape {shape}, not [N, H, W] or [N, H, W, C] with N from 1, "
            "H and W from 11 (SSIM needs that) and C 1 or 3"
        )


def _npy(file: _Readable, size: int, packed: int, name: str, notes: list[str]) -> np.ndarray:
    """The images in the .npy format, of `size` bytes, `packed` in a file of so many."""
    magic = np.lib.format.read_magic(file)
    if magic not in _NPY_HEADERS:
        raise UsageError(f"{name}has the .npy format {magic}, not 1.0 or 2.0")
    shape, fortran_order, dtype = _NPY_HEADERS[magic](file)
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise UsageError(f"{name}is {dtype}, not uint8 (0 black to 255 white) or floats (0 to 1)")
    check_shape(shape, name)
    if dtype != np.uint8:
        notes.append(f"{name}is {dtype} in [0, 1]; rounded to 256 steps of grey")
    _check_size(shape, dtype.itemsize, size - file.tell(), packed, name)
    if fortran_order:
        whole = np.frombuffer(file.read(), dtype).reshape(shape, order="F")
        return storage.stored(_with_channels(shape), [_pixels(whole, 0, name)])
    return _stored(file, shape, dtype, name)


def _idx(path: Path) -> np.ndarray:
    """The images of one IDX file. Source of the format: yann.lecun.com/exdb/mnist."""
    gzipped = path.suffix == ".gz"
    with _refusing(path, "IDX file"), gzip.open(path) if gzipped else open(path, "rb") as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or dimensions not in (3, 4):
            raise UsageError("is no IDX file of images (uint8, 3 or 4 dimensions)")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        check_shape(shape)
        packed = path.stat().st_size
        _check_size(shape, 1, None if gzipped else packed - file.tell(), packed, "")
        return _stored(file, shape, np.dtype(np.uint8), "")


def _check_size(shape: tuple[int, ...], itemsize: int, held: int | None, packed: int, name: str) -> None:
    size = math.prod(shape) * itemsize
    if held is not None and size != held:
        raise UsageError(f"{name}says shape {shape}, but holds another number of bytes")
    if size > _MAX_EXPANSION * packed:
        raise UsageError(f"{name}is packed more than {_MAX_EXPANSION}-fold, as images are not")


def _stored(file: _Readable, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """The pixels that `file` holds from where it is at to its end."""
    one = math.prod(shape[1:]) * dtype.itemsize
    at_once = max(1, storage.BLOCK // one)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], at_once):
            count = min(at_once, shape[0] - start)
            content = file.read(count * one)
            if len(content) != count * one:
                raise EOFError(f"ends within image {start + len(content) // one + 1} of {shape[0]}")
            yield _pixels(np.frombuffer(content, dtype).reshape(count, *shape[1:]), start, name)
        if file.read(1):
            raise ValueError(f"holds more than {shape[0]} images")

    return storage.stored(_with_channels(shape), blocks())


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (*shape, 1)


def _pixels(images: np.ndarray, start: int, name: str) -> np.ndarray:
    """Images, of which the first is number `start`, as uint8 [N, H, W, C]."""
    if images.dtype != np.uint8:
        wrong = ~((images >= 0) & (images <= 1))  # so that it holds for NaN
        if wrong.any():
            place = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])
            value = images[place][wrong[place]].flat[0]
            raise UsageError(
                f"{name}has {value:g} in image {start + place + 1}; floats are to be from 0 to 1 "
                "(where white is 255: divide by 255, or save as uint8)"
            )
        images = np.rint(images.astype(np.float32) * 255).astype(np.uint8)
    return images.reshape(_with_channels(images.shape))


@contextlib.contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    """Turns what is raised of a file into a UsageError in one line with its name."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--data: {path}: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"--data: {path}: no such file") from None
    except _UNREADABLE as error:
        raise UsageError(f"--data: {path}: not a readable {kind} ({first_line(error)})") from None
