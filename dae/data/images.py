"""`Images`: the images of one part of a data set, clean or in pairs of a noisy and a clean one."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from dae.data import storage
from dae.errors import UsageError

# Weights of red, green and blue in grey, in units of 2^-16. Source: ITU-R BT.601, in Pillow's integers.
LUMA = (19595, 38470, 7471)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of one size or of several, in the values of their files.

    A pair is stored like one image, with the channels of the clean image and then those of the noisy one.
    """

    pixels: np.ndarray
    """Uint8, uint16 or float32: [N, H, W, C] if all images have one size; else [pixels of all images, C], row by row.
    For pairs, C counts the channels of both."""
    is_paired: bool = False
    sizes: np.ndarray | None = None
    """Int64 [N, 2]: height and width of each image; None if all have one size."""

    def __len__(self) -> int:
        return len(self.pixels) if self.sizes is None else len(self.sizes)

    def __getitem__(self, part: slice) -> "Images":
        """Return some of the images, which share the memory."""
        if self.sizes is None:
            return dataclasses.replace(self, pixels=self.pixels[part])
        start, stop, _ = part.indices(len(self))
        bounds = np.concatenate([[0], np.cumsum(self.sizes.prod(axis=1))])
        first, last = bounds[start], bounds[max(start, stop)]
        return dataclasses.replace(self, pixels=self.pixels[first:last], sizes=self.sizes[start:stop])

    @property
    def channels(self) -> int:
        """Channels of one image: 1 or 3."""
        return self.pixels.shape[-1] // (2 if self.is_paired else 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image, without the noisy partner's channels. All images must have one size."""
        height, width = self.pixels.shape[1:3]
        return height, width, self.channels

    @functools.cached_property
    def shapes(self) -> np.ndarray:
        """Int64 [N, 2]: height and width of each image."""
        if self.sizes is not None:
            return self.sizes
        return np.broadcast_to(np.array(self.pixels.shape[1:3], np.int64), (len(self), 2))

    @property
    def rows(self) -> np.ndarray:
        """All pixels, [pixels of all images, C], row by row."""
        return self.pixels.reshape(-1, self.pixels.shape[-1])

    @property
    def clean(self) -> np.ndarray:
        """The `pixels` of the clean images."""
        return self.pixels[..., : self.channels] if self.is_paired else self.pixels

    @functools.cached_property
    def clean_range(self) -> tuple[np.number, np.number]:
        """The lowest and the highest value of the clean images; there must be some."""
        return self.clean.min(), self.clean.max()

    def take(self, indices: np.ndarray) -> "Images":
        """Return a copy of the images at `indices`, in that order."""
        if self.sizes is None:
            return dataclasses.replace(self, pixels=storage.take(self.pixels, indices))
        ends = np.cumsum(self.sizes.prod(axis=1))
        starts, sizes = ends - self.sizes.prod(axis=1), self.sizes[indices]
        blocks = (self.pixels[starts[index] : ends[index]] for index in indices)
        shape = (int(sizes.prod(axis=1).sum()), self.pixels.shape[-1])
        return dataclasses.replace(self, pixels=storage.materialize(shape, blocks, self.pixels.dtype), sizes=sizes)

    def update_digest(self, digest: Any) -> None:
        """Add the images, their shapes and their type to a digest of hashlib."""
        kind = "" if self.pixels.dtype == np.uint8 else self.pixels.dtype.name
        digest.update(f"{self.pixels.shape}{kind}{'paired' if self.is_paired else ''}".encode())
        if self.sizes is not None:
            digest.update(np.ascontiguousarray(self.sizes).data)
        digest.update(np.ascontiguousarray(self.pixels).data)


def same(one: Images, other: Images) -> bool:
    """Return whether two sets of images are equal."""
    return (
        one.is_paired == other.is_paired
        and one.pixels.dtype == other.pixels.dtype
        and np.array_equal(one.shapes, other.shapes)
        and np.array_equal(one.pixels, other.pixels)
    )


class Parts(NamedTuple):
    """The images of a data set as read, by part (dae/data/layout.py), and what the user should know about them."""

    images: dict[str, Images]
    notes: list[str]


def pair(clean: Images, noisy: Images) -> Images:
    """Join clean and noisy images of one size. Raises UsageError if their shapes differ, or integers meet floats.

    If one kind has 8 bits and the other 16, both become 16 bits.
    """
    shapes, dtypes = zip(*((each.pixels.shape, each.pixels.dtype) for each in (clean, noisy)), strict=True)
    dtype = np.promote_types(*dtypes)
    if shapes[0] != shapes[1] or (dtype == np.float32 and dtypes[0] != dtypes[1]):
        raise UsageError(
            f"expected clean and noisy images of equal shapes and types, got {shapes[0]} {dtypes[0]} and "
            f"{shapes[1]} {dtypes[1]}"
        )
    length = max(1, storage.BLOCK // clean.pixels[0].nbytes)
    blocks = (
        np.concatenate([rescaled(each.pixels[start : start + length], dtype) for each in (clean, noisy)], axis=-1)
        for start in range(0, len(clean), length)
    )
    return Images(storage.materialize((*shapes[0][:3], 2 * shapes[0][3]), blocks, dtype), is_paired=True)


def rescaled(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return pixels of 8 bits with 16 bits, if that is `dtype`: 255 becomes 65535."""
    return pixels.astype(np.uint16) * np.uint16(257) if pixels.dtype == np.uint8 and dtype == np.uint16 else pixels


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Convert [..., 3] to grey, [..., 1], as Pillow does; the weights are LUMA."""
    if pixels.dtype == np.float32:
        # In float64 products and sums are exact, so grey stays grey, and no order of summation changes a bit.
        return (pixels.astype(np.float64) @ (np.array(LUMA) / 2**16)).astype(np.float32)[..., None]
    weighted = sum(pixels[..., channel].astype(np.uint32) * np.uint32(weight) for channel, weight in enumerate(LUMA))
    return ((np.asarray(weighted) + np.uint32(2**15)) >> 16).astype(pixels.dtype)[..., None]


def value_range(images: Images, configured: tuple[float, float] | None) -> tuple[float, float]:
    """Return the values of black and white: those configured, or those usual for the type of the pixels."""
    return configured or default_range(images.pixels.dtype)


def shape_as_batch(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the shape [N, H, W, C] of an array [H, W], [H, W, C], [N, H, W] or [N, H, W, C]. Raises UsageError.

    Three dimensions are [H, W, C] if the last is 1 or 3, and [N, H, W] if all but the first are at least 11.
    """
    if len(shape) == 2 and min(shape) > 0:
        return (1, shape[0], shape[1], 1)
    if len(shape) == 3 and shape[2] in (1, 3) and min(shape) > 0:
        return (1, shape[0], shape[1], shape[2])
    if len(shape) == 3 and min(shape[1:]) >= 11 and shape[0] > 0:
        return (shape[0], shape[1], shape[2], 1)
    if len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0:
        return (shape[0], shape[1], shape[2], shape[3])
    raise UsageError(f"expected images [H, W], [H, W, C], [N, H, W] or [N, H, W, C] with C 1 or 3, got {shape}")


def mean_brightness(images: Images, configured: tuple[float, float] | None) -> float:
    """Return the mean of all values of the clean images, from 0 (black) to 1 (white)."""
    low, high = value_range(images, configured)
    return (float(images.clean.mean(dtype=np.float64)) - low) / (high - low)


def default_range(dtype: np.dtype) -> tuple[float, float]:
    """Return the usual values of black and white: 0 and the largest for integers, 0 and 1 for floats."""
    return 0.0, 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
