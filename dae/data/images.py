"""`Images`: the images of a split, clean ones or pairs of a noisy and a clean one, and what their arrays mean."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection

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
    has_clean: bool = True
    """False if the images are noisy, and there are no clean ones."""
    noise_level: float = 0.0
    """Standard deviation of the noise in such images, if it was estimated; black is 0 and white 1."""

    def __len__(self) -> int:
        return len(self.pixels) if self.sizes is None else len(self.sizes)

    def __getitem__(self, selection: slice) -> "Images":
        """Return a slice of the images, without copying their pixels."""
        if self.sizes is None:
            return dataclasses.replace(self, pixels=self.pixels[selection])
        start, stop, _ = selection.indices(len(self))
        first, last = self.bounds[start], self.bounds[max(start, stop)]
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
    def is_noisy(self) -> bool:
        """True if the images have noise, so that none needs to be added."""
        return self.is_paired or not self.has_clean

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

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """Int64 [N + 1]: the indices in `rows` at which the images start, and the number of all rows."""
        return np.concatenate([[0], self.shapes.prod(axis=1).cumsum()])

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
        starts, ends, rows = self.bounds[indices], self.bounds[indices + 1], self.rows
        blocks = (rows[start:end] for start, end in zip(starts, ends, strict=True))
        taken = storage.materialize((int((ends - starts).sum()), rows.shape[1]), blocks, self.dtype)
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
        noun = f"{'' if self.has_clean else 'noisy '}image{plural}"
        noun = f"pair{plural} of noisy and clean images" if self.is_paired else noun
        kind = f"{'grey' if self.channels == 1 else 'colour'}, {self.dtype.name}"
        size = " to ".join(dict.fromkeys(sizes))
        return f"{len(self):,} {noun}, {size}, {kind} from {self.clean.min():g} to {self.clean.max():g}"


# The images of a data set as read, by split (dae/data/layout.py), and notes on them for the user.
RawSplits = tuple[dict[str, Images], list[str]]


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Convert [..., 3] to grey, [..., 1], as Pillow does; the weights are LUMA."""
    # In float64 products and sums are exact, so grey stays grey, and no order of summation changes a bit.
    grey = pixels.astype(np.float64) @ (np.array(LUMA) / 2**16)
    return (grey if pixels.dtype == np.float32 else np.floor(grey + 0.5)).astype(pixels.dtype)[..., None]


def mean_brightness(images: Images) -> float:
    """Return the mean of all values of the clean images, from 0 (black) to 1 (white)."""
    black, white = images.value_range.black, images.value_range.white
    return (float(images.clean.mean(dtype=np.float64)) - black) / (white - black)


def as_batch(images: np.ndarray, axes: str | None = None, channels: Collection[int] = (1, 3)) -> np.ndarray:
    """Return a view [N, H, W, C] of an array of images; C is one of `channels`.

    `axes` names each axis of the array by a letter, as tifffile does: Y or H for rows, X or W for columns, C or S for
    channels, and any others for the axes that count images, such as YXZ (slices last), NCHW or TZYX. Without it, the
    shape must leave no doubt (`_likely_axes`). Raises UsageError if it does, or if the shape does not fit.
    """
    names = (
        _likely_axes(images.shape, channels) if axes is None else axes.upper().translate(str.maketrans("HWS", "YXC"))
    )
    counting = "".join(name for name in names if name not in "YXC")
    if not (names.isalpha() and len({*names}) == len(names) and {*"YX"} <= {*names} and counting in names):
        raise UsageError(
            f"--axes: {axes}: expected one letter for each axis: Y and X for rows and columns, C for channels, and "
            "others, side by side, for what counts images, such as ZYX, YXZ, NYXC, NCYX or TZYX"
        )
    if (
        len(names) != images.ndim
        or images.size == 0
        or ("C" in names and images.shape[names.index("C")] not in channels)
    ):
        allowed = " or ".join(map(str, sorted(channels)))
        raise UsageError(f"expected images with the axes {names}, C {allowed}, got shape {images.shape}")
    order = [names.index(name) for name in counting + "YXC" if name in names]
    ordered = images.transpose(order) if "C" in names else images.transpose(order)[..., None]
    return ordered.reshape(-1, *ordered.shape[-3:])


def _likely_axes(shape: tuple[int, ...], channels: Collection[int]) -> str:
    """Return the axes of an array of images: YX, YXC, NYX or NYXC. Raises UsageError if others are likely too.

    [N, H, W] could be a volume with its slices last, [Y, X, Z], if N and H are like the sides of an image. That is
    ruled out if H and W are equal, and N is not, or if one of N and H is more than four times the other.
    """
    match shape:
        case (_, _):
            return "YX"
        case (_, _, last) if last in channels:
            return "YXC"
        case (_, _, _, last) if last in channels:
            return "NYXC"
        case (first, _, _) if first in channels and first > 1:
            raise UsageError(f"{shape} is one image with its channels first, or {first} images; add --axes CYX or NYX")
        case (_, first, _, _) if first in channels:
            raise UsageError(f"{shape} has its channels first, or is no array of images; add --axes NCYX if it is")
        case (count, height, width) if min(height, width) >= MIN_SIDE:
            if (height == width != count) or max(count, height) > 4 * min(count, height):
                return "NYX"
            raise UsageError(
                f"{shape} is {count} images of {height} x {width}, or {width} of {count} x {height}; "
                "add --axes NYX or, with the images last, YXN"
            )
    raise UsageError(
        f"expected images [H, W], [H, W, C], [N, H, W] with H and W >= {MIN_SIDE}, or [N, H, W, C], C "
        f"{' or '.join(map(str, sorted(channels)))}, got {shape}; --axes names other orders, such as YXN or NCYX"
    )


def check_sides(height: int, width: int) -> None:
    """Raise UsageError if images of this size are too small for SSIM."""
    if min(height, width) < MIN_SIDE:
        raise UsageError(
            f"expected images of at least {MIN_SIDE} x {MIN_SIDE}, the window of SSIM, got {height} x {width}"
        )


def examples_per_epoch(images: Images, config: RunConfig) -> int:
    """Return the number of examples in an epoch: all images, or with `config.patch_size` a number of patches."""
    return int(examples_per_image(images, config).sum())


def examples_per_image(images: Images, config: RunConfig) -> np.ndarray:
    """Return the number of examples of each image, int64 [N]: with patches, as many as its area holds, at least 1.

    `config.patches_per_epoch` are divided among the images by area.
    """
    if config.patch_size is None:
        return np.ones(len(images), np.int64)
    areas = images.shapes.prod(axis=1)
    if config.patches_per_epoch is not None:
        return np.maximum(1, np.diff(areas.cumsum() * config.patches_per_epoch // areas.sum(), prepend=0))
    return np.maximum(1, areas // config.patch_size**2)


def example_shape(images: Images, config: RunConfig) -> tuple[int, int, int]:
    """Return the (H, W, C) of one example: of an image, or with `config.patch_size` of a patch."""
    if config.patch_size is None:
        return images.image_shape
    return config.patch_size, config.patch_size, images.channels
