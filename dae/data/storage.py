"""Where pixels lie: in memory, or, where they are too many, in a temporary file that is mapped.

The system keeps of a mapped file what memory has room for, and reads the rest when it is asked for. Both ways give the
same bits. The file has no name, so it is gone with the process, however that ends; it lies in TMPDIR, or else in
/var/tmp, which is on a disk where /tmp may be in memory.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dae.errors import UsageError

# The most bytes of one array that are held in memory.
IN_MEMORY = 2**30
# Images of an array are moved in blocks of about so many bytes.
BLOCK = 2**24


def stored(shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks of images, uint8 [some, H, W, C], one after the other as one array of at most `shape`.

    An array beyond IN_MEMORY is an np.memmap of a temporary file. Raises UsageError where the disk is full.
    """
    count = 0
    if math.prod(shape) <= IN_MEMORY:
        images = np.empty(shape, np.uint8)
        for block in blocks:
            images[count : count + len(block)] = block
            count += len(block)
        return images[:count]
    folder = os.environ.get("TMPDIR", "/var/tmp")
    with contextlib.ExitStack() as stack:
        with _blaming(folder):
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
        for block in blocks:
            left = np.ascontiguousarray(block).data.cast("B")
            with _blaming(folder):
                while left:
                    left = left[file.write(left) :]
            count += len(block)
        # For writing, though nobody does, since NumPy lends TensorFlow no other.
        return np.memmap(file, np.uint8, "r+", shape=(count, *shape[1:]))


@contextlib.contextmanager
def _blaming(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot be unpacked to {folder} ({error.strerror}); TMPDIR may name another place") from None


def selected(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The images at `places`, in that order, stored anew."""
    parts = -(-images[0].nbytes * len(places) // BLOCK)
    return stored((len(places), *images.shape[1:]), (images[some] for some in np.array_split(places, parts)))


def reader(images: np.ndarray) -> Callable[[Any], Any]:
    """The function from indices, [n], to pixels, uint8 [n, H, W, C]; what is mapped is not copied."""
    import tensorflow as tf  # here, since images are also read by programs of PyTorch, which it makes crash

    if not isinstance(images, np.memmap):
        pixels = tf.constant(images)
        return lambda indices: tf.gather(pixels, indices)
    # A slice may lie where TensorFlow cannot take it, between its multiples of 64 bytes: the whole is taken.
    whole = images.base if isinstance(images.base, np.memmap) else images
    first = (images.ctypes.data - whole.ctypes.data) // images[0].nbytes
    mapped = tf.experimental.dlpack.from_dlpack(whole.__dlpack__())
    return lambda indices: tf.gather(mapped, first + indices)
