"""The value range of images: their values of black and white, for the data type that these were given for."""

import dataclasses
import json

import numpy as np
from numpy.typing import DTypeLike

from dae.errors import UsageError, warn

# Model files hold the value range of the training images under this name.
NOTE = "dae.json"
# The rule of `check`: the side of a block in pixels, the margin as a fraction of the value range, the fraction of the
# blocks of an image that may exceed it, and the farthest that a single value may be out of the range.
BLOCK, MARGIN, EXCEPTIONS, FARTHEST = 16, 0.25, 0.01, 10
# If the largest value is at most this fraction of white, another value may be white.
NEARLY_BLACK = 0.25
# Ranges that images often have, to suggest one.
_USUAL = ((0, 1), (-1, 1), (0, 255), (0, 4095), (0, 65535))


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """The values of black and white in images of one data type."""

    black: float
    white: float
    dtype: str
    """NumPy's name of the type of the files or arrays, such as uint16, in the byte order of any machine."""

    @classmethod
    def requested(cls, ends: tuple[float, float] | None, dtype: DTypeLike) -> "ValueRange":
        """Return the range that a user asks for, or if `ends` is None the usual one of the type.

        Raises UsageError for a type without a usual range, or that holds no numbers of at most 64 bits, and for a range
        that is empty or not finite.
        """
        dtype = np.dtype(dtype)
        if dtype.kind not in "fiub" or dtype.itemsize > 8:
            raise UsageError(f"expected integers or floats of at most 64 bits, got {dtype}")
        ends = ends or _usual(dtype)
        if ends is None:
            raise UsageError(
                f"expected uint8, uint16, or floats from 0 (black) to 1 (white), got {dtype}; --value-range BLACK "
                "WHITE allows other integers"
            )
        black, white = map(float, ends)
        if not -np.inf < black < white < np.inf:
            raise UsageError(f"expected two finite numbers in ascending order, got {black} and {white}")
        return cls(black, white, dtype.name)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ValueRange":
        """Return the range that `to_json` has written. Raises TypeError, ValueError or KeyError for other text."""
        return cls(**json.loads(text)["value_range"])

    def to_json(self) -> str:
        """Return the range as the text of NOTE."""
        return json.dumps({"value_range": dataclasses.asdict(self)})

    def of(self, dtype: DTypeLike) -> "ValueRange":
        """Return the range of images of `dtype`: this one if it was given for such images, else the usual one.

        All floats are of one type here. Raises UsageError for another type, if it has no usual range.
        """
        dtype = np.dtype(dtype)
        is_same = dtype.name == self.dtype or (dtype.kind == "f" and self.dtype.startswith("float"))
        return ValueRange.requested((self.black, self.white) if is_same else None, dtype)

    @property
    def is_usual(self) -> bool:
        """True if black and white are those that images of the type have by default."""
        return (self.black, self.white) == _usual(np.dtype(self.dtype))

    def to_unit(self, pixels: np.ndarray) -> np.ndarray:
        """Return the pixels as float32, with 0 for black and 1 for white."""
        return (pixels.astype(np.float32) - np.float32(self.black)) / np.float32(self.white - self.black)

    def from_unit(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return pixels of `dtype` for float32 values, 0 for black and 1 for white; integers rounded and clipped."""
        pixels = np.float32(self.black) + np.float32(self.white - self.black) * values
        if dtype.kind == "f":
            return pixels.astype(dtype)
        limits = np.iinfo(dtype)
        rounded = np.rint(pixels, dtype=np.float64)  # float32 cannot hold the largest values of 32 bits
        return np.clip(rounded, limits.min, limits.max).astype(dtype)


def warn_if_nearly_black(brightest: float, value_range: ValueRange, source: str = "") -> None:
    """Warn if the largest value of images is so small that another value may be white, as with 12 of 16 bits.

    `source` begins the message.
    """
    if brightest <= NEARLY_BLACK * value_range.white:
        likely = 2 ** int(brightest).bit_length() - 1 if brightest >= 1 else brightest
        hint = f"; add --value-range 0 {likely:g} if {likely:g} is white" if likely else ""
        warn(f"{source}nearly black: the largest value is {brightest:g}, but white is {value_range.white:g}{hint}")


def _usual(dtype: np.dtype) -> tuple[float, float] | None:
    if dtype.kind == "f":
        return 0.0, 1.0
    return (0.0, float(np.iinfo(dtype).max)) if dtype.kind == "u" and dtype.itemsize <= 2 else None


def check(images: np.ndarray, value_range: ValueRange) -> None:
    """Raise UsageError if the values of images [N, H, W, C] cannot be in the range, whatever the noise.

    Noise that was not clipped leaves the range, but it averages out: the mean of a block of 16 x 16 pixels exceeds the
    range by more than a quarter in at most 1 % of the blocks of each image. No value is farther away from the range
    than ten times its length, NaN or infinite.
    """
    least, most = float(images.min()), float(images.max())
    black, white = value_range.black, value_range.white
    if black <= least and most <= white:
        return
    if not np.isfinite([least, most]).all():
        raise UsageError("expected finite values, got NaN or infinity")
    is_close = black - FARTHEST * (white - black) <= least and most <= white + FARTHEST * (white - black)
    means = np.stack(list(map(_block_means, images)))
    if not is_close or not _fit(means, black, white, MARGIN):
        # In a range that is much too large, images would be nearly black.
        fitting = (ends for ends in _USUAL if ends[0] < 0 or most > NEARLY_BLACK * ends[1])
        low, high = next((ends for ends in fitting if _fit(means, *ends, margin=0)), (least, most))
        raise UsageError(
            f"values from {least:g} to {most:g} cannot be those of images from {black:g} (black) to {white:g} (white); "
            f"--value-range {low:g} {high:g} fits"
        )


def _fit(means: np.ndarray, black: float, white: float, margin: float) -> bool:
    """Return whether all but a few of the means of blocks are in the range, or exceed it by at most the margin."""
    allowed = margin * (white - black)
    exceeds = (means < black - allowed) | (means > white + allowed)
    return bool((exceeds.mean(axis=1) <= EXCEPTIONS).all())


def _block_means(image: np.ndarray) -> np.ndarray:
    """Return the means of blocks of an image [H, W, C], [blocks]; a rest at the bottom and right is left out."""
    height, width, channels = image.shape
    rows, columns = (max(1, round(side / BLOCK)) for side in (height, width))
    image = image[: height - height % rows, : width - width % columns]
    blocks = image.reshape(rows, height // rows, columns, width // columns, channels)
    return blocks.mean(axis=(1, 3, 4), dtype=np.float64).ravel()
