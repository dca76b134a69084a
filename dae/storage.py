"""Where pixels lie: in memory, or, where they are too many, in a temporary file that TensorFlow reads from.

The file is mapped: the system keeps of it what memory has room for and reads the rest when it is asked for. Both ways
give the same bits. The file has no name, so it is gone with the process, however that ends; it lies in TMPDIR, or else
in /var/tmp, which is on a disk where /tmp may be in memory.
"""

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

# The most bytes of one array that are held in memory.
IN_MEMORY = 2**30
# Images of an array are moved in blocks of about so many bytes.
BLOCK = 2**24


def stored(shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks of images, uint8 [some, H, W, C], one after the other as one read-only array of at most `shape`.

    An array beyond IN_MEMORY is an np.memmap of a temporary file. Raises OSError where the disk is full.
    """
    count = 0
    if math.prod(shape) <= IN_MEMORY:
        images = np.empty(shape, np.uint8)
        for block in blocks:
            images[count : count + len(block)] = block
            count += len(block)
        images.flags.writeable = False
        return images[:count]
    file = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"), buffering=0)  # noqa: SIM115
    for block in blocks:
        left = np.ascontiguousarray(block).data.cast("B")
        while left:
            left = left[file.write(left) :]
        count += len(block)
    images = np.memmap(f"/dev/fd/{file.fileno()}", np.uint8, "r", shape=(count, *shape[1:]))
    weakref.finalize(images, file.close)  # the number is the file's only name, so it is kept open as long
    return images


def selected(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The images at `places`, in that order, stored anew."""
    parts = -(-images[0].nbytes * len(places) // BLOCK)
    return stored((len(places), *images.shape[1:]), (images[some] for some in np.array_split(places, parts)))


def reader(images: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """The function from indices [n] to pixels, uint8 [n, H, W, C], of an array in memory or a slice of a mapped one."""
    if not isinstance(images, np.memmap):
        pixels = tf.constant(images)
        return lambda indices: tf.gather(pixels, indices)
    whole = images.base if isinstance(images.base, np.memmap) else images
    first = (images.ctypes.data - whole.ctypes.data) // images[0].nbytes
    pixels = tf.raw_ops.ImmutableConst(dtype=tf.uint8, shape=whole.shape, memory_region_name=str(whole.filename))
    return lambda indices: tf.gather(pixels, indices + first)
