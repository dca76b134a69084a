"""Blind noise estimation: the level of the noise in images without clean versions, and how it is not white Gaussian.

Blocks of 8 x 8 pixels, in groups by brightness, with little structure show the noise alone. Half of the frequencies of
their cosine transform selects such blocks; the noise at the other half, which is independent, is measured. Sources:
Ponomarenko et al., An Automatic Approach to Lossy Compression of AVIRIS Images (2007), for the two sets of frequencies;
Foi et al., Practical Poissonian-Gaussian Noise Modeling and Fitting for Single-Image Raw-Data (2008), for the line
through the variances; Nikoukhah et al., ZERO: a Local JPEG Grid Origin Detector (2021), for the zeros that JPEG leaves.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dae.data.images import LUMA, MIN_SIDE, Images
from dae.data.values import ValueRange, check
from dae.errors import UsageError

# The side of the blocks, about how many are used at most, and into how many groups by brightness they are divided.
SIDE, MAX_BLOCKS, GROUPS = 8, 2**16, 6
# Fractions of the blocks, those with the least structure: noise is measured on the first, and compared with the second.
FLAT, LESS_FLAT = 0.05, 0.3
# Blocks with more values than this at black or white are left out, because clipping hides their noise.
MAX_CLIPPED = 2
# Noise with a smaller standard deviation is reported as none, and with a smaller correlation as white.
NONE, CORRELATED = 1 / 255, 0.25
# Structure varies more between blocks than noise does. A group shows noise if its blocks with the least structure have
# this fraction of the variance of more blocks; images show noise if this fraction of their groups does.
FLOOR, WITH_FLOOR = 0.75, 0.3
# The side of the crop that is searched for blocks of JPEG, and how much larger their fraction of zeros must be.
JPEG_CROP, JPEG_ZEROS = 256, 0.02
# A run estimates the noise from at most this many of its images.
SAMPLE = 20

_ROW, _COLUMN = np.divmod(np.arange(SIDE * SIDE), SIDE)
_BASIS = np.cos(np.pi * np.outer(np.arange(SIDE), np.arange(SIDE) + 0.5) / SIDE) * math.sqrt(2 / SIDE)
_BASIS[0] *= math.sqrt(0.5)
# [pixel, frequency], orthonormal: white noise has the same variance at all.
_TRANSFORM = np.kron(_BASIS, _BASIS).T.astype(np.float32)
_INNER = (_ROW > 0) & (_COLUMN > 0)
_HIGH, _LOW = _ROW + _COLUMN >= 10, _INNER & (_ROW + _COLUMN <= 5)
# Weights of the variances in the correlation between neighbours: zero in sum, as for white noise.
_NEIGHBOURS = np.where(_INNER, np.cos(np.pi * _ROW / SIDE) + np.cos(np.pi * _COLUMN / SIDE), 0.0) / 2

# A group: brightness, variance at high and all frequencies, correlation, FLOOR's fraction; and two of the whole image.
_GROUP = np.dtype([(name, float) for name in ("brightness", "high", "all", "correlation", "floor", "clipped", "jpeg")])


class NoiseLevel(NamedTuple):
    """An estimate of the noise in images, where black is 0 and white 1.

    White Gaussian noise has the standard deviation `sigma`; Poisson-Gaussian noise has the variance gain * brightness +
    offset. `sigma_error` is the standard deviation between groups of blocks, because structure that is taken for noise
    does not average out. The errors of gain and offset are standard errors. `correlation` is that of the noise of
    neighbouring pixels, `clipped` the fraction of values that are exactly black or white, and `is_compressed` whether
    blocks of JPEG are found. `groups` is an array with what was measured in each group of blocks.
    """

    sigma: float
    sigma_error: float
    gain: float
    gain_error: float
    offset: float
    offset_error: float
    correlation: float
    clipped: float
    is_compressed: bool
    groups: np.ndarray

    def describe(self) -> str:
        """Return the estimate for the user, in one line."""
        return (
            f"standard deviation {255 * self.sigma:.1f}/255 (+- {255 * self.sigma_error:.1f}); or variance "
            f"{self.gain:.2g} (+- {self.gain_error:.1g}) * brightness + {self.offset:.2g} (+- {self.offset_error:.1g})"
        )

    def problems(self, needs_level: bool = True) -> list[str]:
        """Return how the noise is not white; with `needs_level`, also how it is not Gaussian with a single level."""
        is_noisy = self.sigma > NONE
        rises = is_noisy and self.gain > 4 * self.gain_error and self.gain > self.sigma**2
        correlated = f"noise correlated between pixels ({self.correlation:.2f}), which losses learn as structure"
        clipped = f"{self.clipped:.0%} of the values black or white, where clipped noise does not have mean zero"
        found = {
            "no noise found": not is_noisy,
            correlated: is_noisy and self.correlation > CORRELATED,
            "JPEG compression, which correlates noise": self.is_compressed,
            clipped: self.clipped > 0.02,
            "noise that rises with the brightness, for which no single level is right": needs_level and rises,
        }
        return [problem for problem, is_found in found.items() if is_found]


def estimate_noise(image: np.ndarray, value_range: tuple[float, float] | None = None) -> NoiseLevel:
    """Estimate the noise in an image [H, W] or [H, W, C], C 1 or 3, of integers or floats.

    `value_range` has the values of black and white; the default is the usual one of the type. Raises UsageError for
    other types, shapes and sizes, and for values that cannot be in the value range (`dae.data.values.check`).
    """
    image = np.asarray(image)
    scale, pixels = ValueRange.requested(value_range, image.dtype), np.atleast_3d(image)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or min(pixels.shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"expected an image [H, W] or [H, W, C] of {MIN_SIDE} x {MIN_SIDE} or more, C 1 or 3, got {image.shape}"
        )
    check(pixels[np.newaxis], scale)
    values = scale.to_unit(pixels)
    of_image = (np.isin(values, (0, 1)).mean(), _has_jpeg_blocks(values))
    coefficients = _coefficients(values)
    if len(coefficients) < GROUPS:  # saturated
        return _estimate(np.array([(values.mean(), 0, 0, 0, 0, *of_image)], _GROUP))
    by_brightness = np.array_split(np.argsort(coefficients[:, 0]), GROUPS)
    return _estimate(np.array([(*_measured(coefficients[group]), *of_image) for group in by_brightness], _GROUP))


def combined(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    """Return one estimate for noise that is the same in all images, from the estimate of each."""
    return _estimate(np.concatenate([level.groups for level in levels]))


def of_images(images: Images) -> NoiseLevel:
    """Return the estimate of the noise in some noisy images, at most SAMPLE. Raises as `estimate_noise` does."""
    value_range = (images.value_range.black, images.value_range.white)
    levels = []
    for index in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int)):
        image = images[index : index + 1]
        levels.append(estimate_noise(image.rows.reshape(*image.shapes[0], -1), value_range))
    return combined(levels)


def _coefficients(values: np.ndarray) -> np.ndarray:
    """Return the cosine transform of the blocks of an image [H, W, C] that are not clipped, [blocks, 64]."""
    windows = sliding_window_view(values, (SIDE, SIDE), axis=(0, 1))
    step = math.ceil(math.sqrt(math.prod(windows.shape[:3]) / MAX_BLOCKS))
    blocks = windows[::step, ::step].reshape(-1, SIDE * SIDE)
    return blocks[np.isin(blocks, (0, 1)).sum(axis=1) <= MAX_CLIPPED] @ _TRANSFORM


def _measured(coefficients: np.ndarray) -> tuple[float, ...]:
    """Return the first five fields of _GROUP for a group of blocks."""
    brightness, flat = _power(coefficients, FLAT)
    _, less_flat = _power(coefficients, LESS_FLAT)
    low, inner = less_flat[_LOW].mean(), flat[_INNER].mean()
    correlation = flat @ _NEIGHBOURS / flat[_INNER].sum() if inner else 0  # of constant blocks
    return brightness, flat[_HIGH].mean(), inner, correlation, flat[_LOW].mean() / low if low else 0


def _power(coefficients: np.ndarray, fraction: float) -> tuple[float, np.ndarray]:
    """Return the mean brightness, and the mean square of each coefficient, [64], of blocks with the least structure.

    These are a `fraction` of all. For each half of the coefficients they are chosen by the other half, so that the
    choice does not bias the mean. Where noise rises with the brightness, they are the darker ones.
    """
    squares, power, brightness = np.square(coefficients), np.zeros(SIDE * SIDE), 0.0
    count = max(1, int(fraction * len(squares)))
    for parity in (0, 1):
        half = (_ROW + _COLUMN + parity) % 2 == 0
        structure = squares[:, ~half & (_ROW + _COLUMN > 0)].sum(axis=1)
        chosen = np.argpartition(structure, count - 1)[:count]
        power[half] = squares[chosen][:, half].mean(axis=0)
        brightness += coefficients[chosen, 0].mean() / SIDE / 2
    return brightness, power


def _estimate(groups: np.ndarray) -> NoiseLevel:
    """Return the estimate from groups of blocks, an array of _GROUP."""
    # At least half of the groups, and all that show noise.
    best = groups[groups["floor"] >= min(FLOOR, np.median(groups["floor"]))]
    correlation = np.median(best["correlation"]) if np.mean(groups["floor"] > FLOOR) > WITH_FLOOR else 0.0
    # Structure is mostly in low frequencies, but so is correlated noise.
    band = "all" if correlation > CORRELATED else "high"
    deviations = np.sqrt(best[band])
    varied = groups[groups[band] > 1e-9]  # not of constant images
    line, covariance = np.zeros(2), np.zeros((2, 2))
    # Brightness that differs by more than its rounding, unlike that of a pattern, has a line.
    if len(varied) > 2 and np.ptp(varied["brightness"]) > 1e-5:  # errors of variances are proportional to them
        line, covariance = np.polyfit(varied["brightness"], varied[band], 1, w=1 / varied[band], cov=True)
    (gain, offset), (gain_error, offset_error) = line, np.sqrt(np.diag(covariance))
    clipped, jpeg = np.median(groups["clipped"]), np.median(groups["jpeg"])
    values = (np.median(deviations), deviations.std(), gain, gain_error, offset, offset_error, correlation, clipped)
    return NoiseLevel._make([*map(float, values), bool(jpeg > 0.5), groups])


def _has_jpeg_blocks(values: np.ndarray) -> bool:
    """Return whether an image [H, W, C] of 8 bits was compressed by JPEG.

    JPEG rounds many coefficients of its blocks to zero; blocks at other positions have few zeros.
    """
    grey = 255 * (values @ (np.array(LUMA, np.float32) / 2**16) if values.shape[2] == 3 else values[..., 0])
    top, left = (max(0, (side - JPEG_CROP) // 2) for side in grey.shape)
    windows = sliding_window_view(grey[top:, left:][:JPEG_CROP, :JPEG_CROP], (SIDE, SIDE))
    rows, columns = (side // SIDE for side in windows.shape[:2])
    if rows * columns < 16:  # too few to tell
        return False
    blocks = windows[: rows * SIDE, : columns * SIDE].reshape(-1, SIDE * SIDE)
    zeros = np.mean(np.abs(blocks @ _TRANSFORM[:, _ROW + _COLUMN >= 6]) < 0.5, axis=1)
    *_, second, most = np.sort(zeros.reshape(rows, SIDE, columns, SIDE).mean(axis=(0, 2)).ravel())
    return bool(most - second > JPEG_ZEROS)
