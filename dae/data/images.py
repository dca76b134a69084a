"""`Images`: the images of a split, clean ones or pairs of a noisy and a clean one, and what their arrays mean."""

import dataclasses
import functools
import hashlib

import numpy as np

from dae.config import RunConfig
from dae.data import storage
from dae.data.values import ValueRange
from dae.errors import UsageError

# The smallest height and width of an image: the window of SSIM.
MIN_SIDE = 11
# Weights of red, green and blue in grey, in units of 2^-16. Source: ITU-R BT.601, in Pillow's integers.
LUMA = (19595, 38470, 7471)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of one size or of several, with the values of their files.

    A pair is stored like one image, with the channels of the clean image and then those of the noisy one.
    """

    pixels: np.ndarray
    """Uint8, uint16 or float32: [N, H, W, C] if all images have one size; else [pixels of all images, C], row by row.
    For pairs, C counts the channels of both images."""
    is_paired: bool = False
    sizes: np.ndarray | None = None
    """Int64 [N, 2]: height and width of each image; None if all have one size."""
    given_range: ValueRange | None = None
    """The value range of the files; None for the usual one of the pixels' type."""

    def __len__(self) -> int:
        return len(self.pixels) if self.sizes is None else len(self.sizes)

    def __getitem__(self, selection: slice) -> "Images":
        """Return a slice of the images, without copying their pixels."""
        if self.sizes is None:
            return dataclasses.replace(self, pixels=self.pixels[selection])
        start, stop, _ = selection.indices(len(self))
        bounds = np.concatenate([[0], np.cumsum(self.sizes.prod(axis=1))])
        first, last = bounds[start], bounds[max(start, stop)]
        return dataclasses.replace(self, pixels=self.pixels[first:last], sizes=self.sizes[start:stop])

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels."""
        return self.pixels.dtype

    @property
    def value_range(self) -> ValueRange:
        """The values of black and white."""
        return self.given_range or ValueRange.requested(None, self.dtype)

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
        return self.pixels[..., : self.channels]

    def take(self, indices: np.ndarray) -> "Images":
        """Return a copy of the images at `indices`, in that order."""
        areas, rows = self.shapes.prod(axis=1), self.rows
        ends = np.cumsum(areas)
        blocks = (rows[end - area : end] for end, area in zip(ends[indices], areas[indices], strict=True))
        taken = storage.materialize((int(areas[indices].sum()), rows.shape[1]), blocks, self.dtype)
        if self.sizes is None:
            return dataclasses.replace(self, pixels=taken.reshape(-1, *self.pixels.shape[1:]))
        return dataclasses.replace(self, pixels=taken, sizes=self.sizes[indices])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images, their shapes and their type."""
        digest = hashlib.sha256(f"{self.pixels.shape} {self.dtype.name} {self.is_paired}".encode())
        for array in (self.shapes, self.pixels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def describe(self) -> str:
        """Return a description for the user: the number of images, their sizes, type and range of values."""
        if not len(self):
            return "no images"
        areas = self.shapes.prod(axis=1)
        sizes = [f"{height} x {width}" for height, width in self.shapes[[areas.argmin(), areas.argmax()]]]
        plural = "" if len(self) == 1 else "s"
        noun = f"pair{plural} of noisy and clean images" if self.is_paired else f"image{plural}"
        kind = f"{'grey' if self.channels == 1 else 'colour'}, {self.dtype.name}"
        size = " to ".join(dict.fromkeys(sizes))
        return f"{len(self):,} {noun}, {size}, {kind} from {self.clean.min():g} to {self.clean.max():g}"


# The images of a data set as read, by split (dae/data/layout.py), and notes on them for the user.
RawSplits = tuple[dict[str, Images], list[str]]


def rescaled(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return pixels of 8 bits with 16 bits, if that is `dtype`: 255 becomes 65535."""
    return pixels.astype(np.uint16) * np.uint16(257) if pixels.dtype == np.uint8 and dtype == np.uint16 else pixels


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Convert [..., 3] to grey, [..., 1], as Pillow does; the weights are LUMA."""
    # In float64 products and sums are exact, so grey stays grey, and no order of summation changes a bit.
    grey = pixels.astype(np.float64) @ (np.array(LUMA) / 2**16)
    return (grey if pixels.dtype == np.float32 else np.floor(grey + 0.5)).astype(pixels.dtype)[..., None]


def mean_brightness(images: Images) -> float:
    """Return the mean of all values of the clean images, from 0 (black) to 1 (white)."""
    black, white = images.value_range.black, images.value_range.white
    return (float(images.clean.mean(dtype=np.float64)) - black) / (white - black)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise UsageError unless `shape` is that of a data set: [N, H, W] or [N, H, W, C], sides >= MIN_SIDE, C 1 or 3."""
    if len(shape) not in (3, 4) or shape[0] < 1 or min(shape[1:3]) < MIN_SIDE or shape[3:] not in ((), (1,), (3,)):
        raise UsageError(
            f"expected shape [N, H, W] or [N, H, W, C], N >= 1, H and W >= {MIN_SIDE} (SSIM), C 1 or 3, got {shape}"
        )


def shape_as_batch(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the shape [N, H, W, C] of an array [H, W], [H, W, C], [N, H, W] or [N, H, W, C]. Raises UsageError.

    Three dimensions are [H, W, C] if the last is 1 or 3, and [N, H, W] if all but the first are at least MIN_SIDE.
    Unlike the images of a data set, a single image can have sides of any length.
    """
    match shape if min(shape, default=0) > 0 else ():
        case (height, width):
            return 1, height, width, 1
        case (height, width, 1 | 3 as channels):
            return 1, height, width, channels
        case (count, height, width) if min(height, width) >= MIN_SIDE:
            return count, height, width, 1
        case (count, height, width, 1 | 3 as channels):
            return count, height, width, channels
    raise UsageError(f"expected images [H, W], [H, W, C], [N, H, W] or [N, H, W, C] with C 1 or 3, got {shape}")


def examples_per_epoch(images: Images, config: RunConfig) -> int:
    """Return the number of examples in an epoch: all images, or with `config.patch_size` a number of patches."""
    return int(examples_per_image(images, config).sum())


def examples_per_image(images: Images, config: RunConfig) -> np.ndarray:
    """Return the number of examples of each image, int64 [N]: with patches, as many as its area holds, at least 1."""
    if config.patch_size is None:
        return np.ones(len(images), np.int64)
    return np.maximum(1, images.shapes.prod(axis=1) // config.patch_size**2)


def example_shape(images: Images, config: RunConfig) -> tuple[int, int, int]:
    """Return the (H, W, C) of one example: of an image, or with `config.patch_size` of a patch."""
    if config.patch_size is None:
        return images.image_shape
    return config.patch_size, config.patch_size, images.channels
