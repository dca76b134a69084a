"""Storage of pixels: in memory, or, if they are too many, in a memory-mapped temporary file.

The system keeps as much of a mapped file in memory as there is room for, and reads the rest on demand. The pixels have
the same bits either way. The file has no name, so it disappears with the process, however that ends. It lies in TMPDIR,
or else in /var/tmp, which is on a disk even where /tmp is in memory.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dae.errors import as_usage_error
from dae.files import reserve

# Largest array, in bytes, that is held in memory.
IN_MEMORY = 2**30
# Images are moved in blocks of about this many bytes.
BLOCK = 2**24


def materialize(shape: tuple[int, ...], blocks: Iterable[np.ndarray], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Join blocks of images or rows of pixels, [n, ...], to one array of `dtype` and at most `shape`.

    An array of more than IN_MEMORY bytes becomes an np.memmap of a temporary file. Raises UsageError if the disk has no
    room for it.
    """
    images, count = _empty(shape, np.dtype(dtype)), 0
    for block in blocks:
        images[count : count + len(block)] = block
        count += len(block)
    return images[:count]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    folder = os.environ.get("TMPDIR", "/var/tmp")
    problem = f"cannot hold {size / 2**30:.3g} GiB of images; TMPDIR can name another folder"
    with as_usage_error(folder, problem, OSError), tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), size)
        # Writable, also because NumPy exports no read-only array to TensorFlow, though nothing writes later.
        return np.memmap(file, dtype, "r+", shape=shape)


def gather_fn(images: np.ndarray) -> Callable[[Any], Any]:
    """Return the TensorFlow function from indices, of any shape [...], to pixels, [..., *images.shape[1:]].

    A mapped array is not copied.
    """
    import tensorflow as tf  # not above: the benchmark's PyTorch process, which reads images, crashes beside TensorFlow

    if not isinstance(images, np.memmap):
        pixels = tf.constant(images)
        return lambda indices: tf.gather(pixels, indices)
    # A slice may not be aligned to 64 bytes, as TensorFlow requires, so all that precedes it is passed too.
    whole: np.ndarray = images
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    start = (images.ctypes.data - whole.ctypes.data) // images.itemsize
    whole = whole.reshape(-1)[: start + images.size].reshape(-1, *images.shape[1:])
    first = len(whole) - len(images)
    mapped = tf.experimental.dlpack.from_dlpack(whole.__dlpack__())
    return lambda indices: tf.gather(mapped, first + indices)
