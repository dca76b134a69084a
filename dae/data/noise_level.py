"""The noise in images of which no clean versions exist: its level, and what of it is not white Gaussian noise.

Blocks of 8 x 8 pixels with little structure show the noise alone. Half of the frequencies of their cosine transform
selects such blocks; the noise at the other half, which is independent of that at the first, is measured. The blocks are
grouped by brightness, on which the variance can depend. Sources: Ponomarenko et al., An Automatic Approach to Lossy
Compression of AVIRIS Images (2007), for the two sets of frequencies; Foi et al., Practical Poissonian-Gaussian Noise
Modeling and Fitting for Single-Image Raw-Data (2008), for the line through the variances; Nikoukhah et al., ZERO: a
Local JPEG Grid Origin Detector (2021), for the zeros that JPEG leaves.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dae.data.images import LUMA, MIN_SIDE, Images
from dae.data.values import ValueRange
from dae.errors import UsageError

SIDE, MAX_BLOCKS, GROUPS = 8, 2**16, 6
# The fractions of the blocks, those with the least structure, on which noise is measured, and compared with.
FLAT, LESS_FLAT = 0.05, 0.3
# Blocks with more values at black or white show too little of their noise.
MAX_CLIPPED = 2
# Fewer blocks say too little.
MIN_BLOCKS, MIN_JPEG_BLOCKS = 2 * GROUPS, 16
# The side of the crop in which blocks of JPEG are looked for, and by how much more of their coefficients are zeros.
JPEG_CROP, JPEG_ZEROS = 256, 0.02
# Less noise than this is called none. Structure is correlated too, but varies more between blocks than noise does, of
# which those with the least structure have at least the fraction FLOOR of the variance of others.
NONE, CORRELATED, FLOOR = 1 / 255, 0.15, 0.7
# A run looks at this many of its images.
SAMPLE = 20

_ROW, _COLUMN = np.divmod(np.arange(SIDE * SIDE), SIDE)
_BASIS = np.cos(np.pi * np.outer(np.arange(SIDE), np.arange(SIDE) + 0.5) / SIDE) * math.sqrt(2 / SIDE)
_BASIS[0] *= math.sqrt(0.5)
# [pixel, frequency], orthonormal: white noise has the same variance at all frequencies.
_TRANSFORM = np.kron(_BASIS, _BASIS).T.astype(np.float32)
_INNER = (_ROW > 0) & (_COLUMN > 0)
# Weights of the variances in the correlation between neighbours: zero in sum, as for white noise.
_NEIGHBOURS = np.where(_INNER, np.cos(np.pi * _ROW / SIDE) + np.cos(np.pi * _COLUMN / SIDE), 0.0) / 2
_HIGH, _LOW = _ROW + _COLUMN >= 9, _INNER & (_ROW + _COLUMN <= 5)


class NoiseLevel(NamedTuple):
    """An estimate of the noise in images; black is 0 and white 1. Errors are standard errors."""

    sigma: float
    """Standard deviation of the noise, if it is the same at any brightness."""
    sigma_error: float
    gain: float
    """Poisson-Gaussian noise has the variance gain * brightness + offset."""
    gain_error: float
    offset: float
    offset_error: float
    correlation: float
    """Correlation of the noise between neighbouring pixels; 0 for white noise."""
    clipped: float
    """Fraction of the values that are exactly black or white."""
    is_compressed: bool
    """True if the 8 x 8 blocks of JPEG are found."""
    variances: np.ndarray
    """Mean brightness and variance of the noise in each group of blocks, float64 [groups, 2]."""

    @property
    def is_found(self) -> bool:
        """False if there is hardly more noise than rounding to 8 bits makes."""
        return self.sigma > NONE

    def describe(self) -> str:
        """Return the estimate for the user, in one line."""
        return (
            f"standard deviation {255 * self.sigma:.1f}/255 (+- {255 * self.sigma_error:.1f}); or variance "
            f"{self.gain:.2g} (+- {self.gain_error:.1g}) * brightness + {self.offset:.2g} (+- {self.offset_error:.1g})"
        )

    def problems(self, needs_level: bool = True) -> list[str]:
        """Return what is not white noise; with `needs_level`, also what is not Gaussian noise of a single level."""
        rises = self.gain > 4 * self.gain_error and self.gain > 0.5 * self.sigma**2
        found = {
            "no noise found": self.sigma <= NONE,
            f"noise is correlated between pixels ({self.correlation:.2f})": self.correlation > CORRELATED,
            "compressed by JPEG, which correlates noise": self.is_compressed,
            f"{self.clipped:.0%} of the values are clipped to black or white": self.clipped > 0.02,
            "the noise rises with the brightness": needs_level and rises,
        }
        return [problem for problem, is_found in found.items() if is_found]


def estimate_noise(image: np.ndarray, value_range: tuple[float, float] | None = None) -> NoiseLevel:
    """Estimate the noise in an image [H, W] or [H, W, C], C 1 or 3, of integers or floats.

    `value_range` has the values of black and white; the default is the usual one of the type. Raises UsageError for
    other types, shapes and sizes, and for values that are not finite.
    """
    image = np.asarray(image)
    values = ValueRange.requested(value_range, image.dtype).to_unit(image)
    values = values if values.ndim == 3 else values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3) or min(values.shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"expected an image [H, W] or [H, W, C] of at least {MIN_SIDE} x {MIN_SIDE} pixels, got shape {image.shape}"
        )
    if not np.isfinite(values).all():
        raise UsageError("expected finite values, got NaN or infinity")
    windows = sliding_window_view(values, (SIDE, SIDE), axis=(0, 1))
    step = math.ceil(math.sqrt(math.prod(windows.shape[:3]) / MAX_BLOCKS))
    blocks = windows[::step, ::step].reshape(-1, SIDE * SIDE)
    blocks = blocks[np.isin(blocks, (0, 1)).sum(axis=1) <= MAX_CLIPPED]
    clipped = float(np.isin(values, (0, 1)).mean())
    if len(blocks) < MIN_BLOCKS:  # saturated
        return _fitted(np.zeros((0, 2)), 0.0, clipped, False)
    coefficients = blocks @ _TRANSFORM
    groups = [coefficients[group] for group in np.array_split(np.argsort(coefficients[:, 0]), GROUPS)]
    flat, other = (np.array([_flat_power(group, fraction) for group in groups]) for fraction in (FLAT, LESS_FLAT))
    brightness = [group[:, 0].mean() / SIDE for group in groups]
    variances = np.stack([brightness, flat[:, _HIGH].mean(axis=1)], axis=1)
    is_floor = np.median(flat[:, _LOW].mean(axis=1) / other[:, _LOW].mean(axis=1)) > FLOOR
    correlation = float(np.median(flat @ _NEIGHBOURS / flat[:, _INNER].sum(axis=1))) if is_floor else 0.0
    return _fitted(variances, correlation, clipped, _has_jpeg_blocks(values))


def combined(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    """Return the estimate of noise that is the same in all images, from those of each image."""
    found = [level for level in levels if len(level.variances)] or levels
    medians = [np.median([level[index] for level in found]) for index in (6, 7, 8)]
    variances = np.concatenate([level.variances for level in found])
    return _fitted(variances, float(medians[0]), float(medians[1]), bool(medians[2] > 0.5))


def of_images(images: Images) -> NoiseLevel:
    """Return the estimate of the noise in some noisy images, at most SAMPLE. Raises as `estimate_noise` does."""
    ends, value_range = np.cumsum(images.shapes.prod(axis=1)), (images.value_range.black, images.value_range.white)
    levels = []
    for index in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int)):
        shape = images.shapes[index]
        pixels = images.rows[ends[index] - shape.prod() : ends[index]]
        levels.append(estimate_noise(pixels.reshape(*shape, -1), value_range))
    return combined(levels)


def _fitted(variances: np.ndarray, correlation: float, clipped: float, is_compressed: bool) -> NoiseLevel:
    """Return the estimate from the mean brightness and the variance of groups of blocks, [groups, 2]."""
    if not len(variances):
        return NoiseLevel(*np.zeros(6), correlation, clipped, is_compressed, variances)
    brightness, variance = variances.T
    weights = np.maximum(variance, 1e-12) ** -2  # the standard error of a variance is proportional to it
    mean = np.average(brightness, weights=weights)
    spread = np.sum(weights * (brightness - mean) ** 2)
    gain = np.sum(weights * (brightness - mean) * variance) / spread
    offset = np.average(variance, weights=weights) - gain * mean
    scatter = np.sum(weights * (variance - gain * brightness - offset) ** 2) / (len(variances) - 2)
    gain_error, offset_error = (
        math.sqrt(scatter / spread),
        math.sqrt(scatter / weights.sum() + scatter / spread * mean**2),
    )
    sigmas = np.sqrt(variance)
    sigma_error = 1.25 * sigmas.std() / math.sqrt(len(sigmas))  # of a median
    estimates = np.median(sigmas), sigma_error, gain, gain_error, offset, offset_error
    return NoiseLevel(*map(float, estimates), correlation, clipped, is_compressed, variances)


def _flat_power(coefficients: np.ndarray, fraction: float) -> np.ndarray:
    """Return the mean square of each coefficient [64] in the `fraction` of the blocks that have the least structure.

    Blocks are chosen by the other half of the frequencies, so that the choice does not change the mean.
    """
    squares = np.square(coefficients)
    count = max(1, int(fraction * len(squares)))
    power = np.zeros(SIDE * SIDE)
    for half in ((_ROW + _COLUMN) % 2 == 0, (_ROW + _COLUMN) % 2 == 1):
        structure = squares[:, ~half & (_ROW + _COLUMN > 0)].sum(axis=1)
        power[half] = squares[np.argpartition(structure, count - 1)[:count]][:, half].mean(axis=0)
    return power


def _has_jpeg_blocks(values: np.ndarray) -> bool:
    """Return whether an image [H, W, C] of 8 bits was compressed by JPEG.

    JPEG leaves zeros among the coefficients of its own blocks, and not of those that are shifted against them.
    """
    grey = 255 * (values @ (np.array(LUMA, np.float32) / 2**16) if values.shape[2] == 3 else values[..., 0])
    height, width = (min(side, JPEG_CROP) for side in grey.shape)
    top, left = (grey.shape[0] - height) // 2, (grey.shape[1] - width) // 2
    windows = sliding_window_view(grey[top : top + height, left : left + width], (SIDE, SIDE))
    rows, columns = windows.shape[0] // SIDE, windows.shape[1] // SIDE
    if rows * columns < MIN_JPEG_BLOCKS:
        return False
    blocks = windows[: rows * SIDE, : columns * SIDE].reshape(-1, SIDE * SIDE)
    zeros = np.mean(np.abs(blocks @ _TRANSFORM[:, _ROW + _COLUMN >= 6]) < 0.5, axis=1)
    *_, second, most = np.sort(zeros.reshape(rows, SIDE, columns, SIDE).mean(axis=(0, 2)).ravel())
    return bool(most - second > JPEG_ZEROS)
