"""Denoising without training: filters that are tuned on validation images, and the exact posterior mean.

The filters are made for noise of mean 0, but clipped noise brightens black and darkens white. So each is followed by
`gain * denoised + offset`, fitted to the clean validation images by least squares, and by clipping to [0, 1]. Source:
Foi, Clipped Noisy Images: Heteroskedastic Modeling and Practical Denoising (2009), which inverts the bias exactly.

Needs the extra `baselines`. Importing this module does not load TensorFlow, because processes that filter need none.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import bm3d as bm3d_package
import numpy as np
from scipy import ndimage, special
from skimage import restoration
from tqdm import tqdm

from dae.errors import Interrupted

# A function from noisy to denoised images, both float32 [N, H, W, C].
Denoise = Callable[[np.ndarray], np.ndarray]


def median(image: np.ndarray, size: int) -> np.ndarray:
    """Return the median of the `size` x `size` pixels around each. Source: SciPy's `median_filter`.

    Images of this and the following functions are float [H, W] of any range.
    """
    return ndimage.median_filter(image, size)


def total_variation(image: np.ndarray, weight: float) -> np.ndarray:
    """Return the minimum over u of |u - image|^2 / 2 + weight * (total variation of u).

    Source: scikit-image's `denoise_tv_chambolle`, iterated until the objective changes by less than 1e-5; Chambolle, An
    Algorithm for Total Variation Minimization and Applications (2004).
    """
    return restoration.denoise_tv_chambolle(image, weight, eps=1e-5, max_num_iter=1000)


def wavelets(image: np.ndarray, sigma: float, levels: int) -> np.ndarray:
    """Return the image with soft-thresholded coefficients of Haar wavelets, averaged over shifts by up to 7 pixels.

    `sigma` is the assumed standard deviation of the noise. Source: scikit-image's `denoise_wavelet`; Chang, Yu and
    Vetterli, Adaptive Wavelet Thresholding for Image Denoising and Compression (2000), for BayesShrink; Coifman and
    Donoho, Translation-Invariant De-Noising (1995), for the shifts. The wavelets db2 and sym4 were worse on MNIST's
    validation images.
    """
    shrunk = []
    for shift in itertools.product(range(min(2**levels, 8)), repeat=2):  # further ones change little
        shifted = np.roll(image, shift, (0, 1))
        shifted = restoration.denoise_wavelet(
            shifted, sigma, "haar", wavelet_levels=levels, method="BayesShrink", rescale_sigma=False
        )
        shrunk.append(np.roll(shifted, np.negative(shift), (0, 1)))
    return np.mean(shrunk, axis=0)


def non_local_means(
    image: np.ndarray, sigma: float, strength: float, patch_size: int, patch_distance: int
) -> np.ndarray:
    """Return for each pixel the mean of those at most `patch_distance` away, weighted by how similar their patches are.

    The weight of a patch with mean squared difference d is exp(-max(d - 2 sigma^2, 0) / strength^2). Source:
    scikit-image's `denoise_nl_means`; Buades, Coll and Morel, A Non-Local Algorithm for Image Denoising (2005).
    """
    return restoration.denoise_nl_means(image, patch_size, patch_distance, h=strength, sigma=sigma, fast_mode=True)


def bm3d(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return the image filtered by BM3D; `sigma` is the assumed standard deviation of the noise.

    Source: the authors' package; Dabov, Foi, Katkovnik and Egiazarian, Image Denoising by Sparse 3-D Transform-Domain
    Collaborative Filtering (2007), with the variances of Mäkinen, Azzari and Foi, Collaborative Filtering of Correlated
    Noise (2020).
    """
    profile = bm3d_package.BM3DProfile()
    profile.num_threads = 1
    # Every block is a reference, instead of every third in each direction: images are small. On MNIST's validation
    # images this gains 0.08 dB, and takes a quarter longer.
    profile.step_ht = profile.step_wiener = 1
    # Variances are computed for 16 x 16 pixels instead of 32 x 32, which takes a seventh of the time for 28 x 28,
    # and was no worse there.
    profile.nf = 16
    return bm3d_package.bm3d(image, sigma, profile)


@dataclasses.dataclass(frozen=True)
class Method:
    """A filter of one channel, and the values of its parameters that tuning starts with.

    Floats are multiples of the noise level, in ascending order, each the one before times the same factor.
    """

    function: Callable[..., np.ndarray]
    grid: Mapping[str, tuple]


METHODS = {
    "median": Method(median, {"size": (1, 3, 5, 7)}),
    "total variation": Method(total_variation, {"weight": (0.46, 0.53, 0.61)}),
    "wavelets": Method(wavelets, {"sigma": (0.53, 0.57, 0.61), "levels": (2, 3, 4)}),
    "non-local means": Method(
        non_local_means,
        {"sigma": (0.57, 0.64), "strength": (0.22, 0.28), "patch_size": (3, 5, 7), "patch_distance": (5, 7, 9, 11)},
    ),
    "BM3D": Method(bm3d, {"sigma": (0.53, 0.57, 0.61)}),
}
# How often a grid grows by one value of one parameter.
MAX_WIDENINGS = 20


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method with the parameters that are best on validation images."""

    name: str
    parameters: dict[str, Any]
    """Floats are in units of brightness."""
    gain: float
    offset: float
    psnr: float
    """Mean PSNR, in dB, on the validation images."""
    at_edge: list[str]
    """The numbers whose best value is the lowest or the highest that was tried."""

    def __str__(self) -> str:
        values = {
            name: f"{value:.3g}" if isinstance(value, float) else value for name, value in self.parameters.items()
        }
        text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        edge = f"; at the edge of the grid: {', '.join(self.at_edge)}" if self.at_edge else ""
        return f"{text}; gain {self.gain:.3f}, offset {self.offset:+.3f}; {self.psnr:.2f} dB on validation images{edge}"


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Start `count` processes for `tune` and `denoise`, and end them at the end of the block or on SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number, "stopped; repeat the command")

    spawn = multiprocessing.get_context("spawn")  # TensorFlow's threads do not survive a fork
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with ProcessPoolExecutor(count, spawn, initializer=_leave_interruptions_to_the_parent) as executor:
            yield executor
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_interruptions_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def denoise(executor: Executor, tuned: Tuned, noisy: np.ndarray) -> tuple[np.ndarray, float]:
    """Filter and correct images, float32 [N, H, W, C] in [0, 1].

    Returns the denoised images, and the median of the milliseconds that an image takes on one core.
    """
    filtered, milliseconds = _filter(executor, tuned.name, tuned.parameters, noisy)
    return correct(filtered, tuned.gain, tuned.offset), milliseconds


def _filter(
    executor: Executor, name: str, parameters: Mapping[str, Any], noisy: np.ndarray
) -> tuple[np.ndarray, float]:
    """Filter images, each channel for itself; return them and the median of the milliseconds per image."""
    blocks = np.array_split(noisy, -(-len(noisy) // 20))
    arguments = itertools.repeat(METHODS[name].function), itertools.repeat(parameters), blocks
    results = list(tqdm(executor.map(_filter_block, *arguments), name, len(blocks), leave=False, disable=None))
    filtered, seconds = zip(*results, strict=True)
    return np.concatenate(filtered), 1000 * float(np.median(np.concatenate(seconds)))


def _filter_block(
    function: Callable[..., np.ndarray], parameters: Mapping[str, Any], noisy: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    filtered, seconds = np.empty_like(noisy), []
    for source, target in zip(noisy, filtered, strict=True):
        started = time.perf_counter()
        for channel in range(noisy.shape[-1]):
            target[..., channel] = function(source[..., channel], **parameters)
        seconds.append(time.perf_counter() - started)
    return filtered, seconds


def tune(executor: Executor, name: str, level: float, noisy: np.ndarray, clean: np.ndarray) -> Tuned:
    """Tune the parameters of a method for the best mean PSNR after correction.

    Tries every combination of the grid, and then further values of the floats, one at a time, while the best value of
    one is the lowest or the highest.

    Args:
        executor: From `processes`.
        name: A key of METHODS.
        level: The noise level, > 0.
        noisy: Validation images, float32 [N, H, W, C] in [0, 1].
        clean: The same images without noise.
    """
    grid = {parameter: list(values) for parameter, values in METHODS[name].grid.items()}

    def score(values: tuple) -> Tuned:
        multiples = dict(zip(grid, values, strict=True))
        parameters = {key: value * level if isinstance(value, float) else value for key, value in multiples.items()}
        filtered, _ = _filter(executor, name, parameters, noisy)
        gain, offset = fit_correction(filtered, clean)
        psnr = mean_psnr(clean, correct(filtered, gain, offset))
        return Tuned(name, parameters, gain, offset, psnr, at_edge=[])

    scores = {values: score(values) for values in itertools.product(*grid.values())}
    for _ in range(MAX_WIDENINGS):
        best = max(scores, key=lambda values: scores[values].psnr)
        wider = _widen(grid, best)
        if wider is None:
            break
        scores[wider] = score(wider)
    best = max(scores, key=lambda values: scores[values].psnr)
    at_edge = [
        parameter
        for (parameter, tried), value in zip(grid.items(), best, strict=True)
        if value in (min(tried), max(tried))
    ]
    return dataclasses.replace(scores[best], at_edge=at_edge)


def _widen(grid: dict[str, list], best: tuple) -> tuple | None:
    """Add a value to the first float whose best value is at an edge; return `best` with that value, or None."""
    for place, (tried, value) in enumerate(zip(grid.values(), best, strict=True)):
        if isinstance(value, float) and value in (tried[0], tried[-1]):
            if value == tried[0]:
                new = tried[0] ** 2 / tried[1]
                tried.insert(0, new)
            else:
                new = tried[-1] ** 2 / tried[-2]
                tried.append(new)
            return (*best[:place], new, *best[place + 1 :])
    return None


def fit_correction(filtered: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
    """Return the gain and offset with the least squared error of `gain * filtered + offset`, before clipping."""
    filtered, clean = filtered.astype(np.float64), clean.astype(np.float64)
    deviations = filtered - filtered.mean()
    gain = float((deviations * clean).sum() / max((deviations**2).sum(), 1e-12))  # 0 for constant images
    return gain, float(clean.mean() - gain * filtered.mean())


def correct(filtered: np.ndarray, gain: float, offset: float) -> np.ndarray:
    """Return `gain * filtered + offset`, clipped to [0, 1]."""
    return np.clip(gain * filtered + offset, 0, 1)


def mean_psnr(clean: np.ndarray, denoised: np.ndarray) -> float:
    """Return the mean over images [N, H, W, C] of -10 log10(MSE), in dB."""
    return float(np.mean(-10 * np.log10(np.mean((clean - denoised) ** 2, axis=(1, 2, 3)))))


def posterior_mean(images: np.ndarray, level: float) -> Denoise:
    """Return the denoiser E[x | y] for clipped Gaussian noise, if each of the images is as likely to be the clean one.

    E[x | y] = sum_i p(y | x_i) x_i / sum_i p(y | x_i), over all images x_i. A pixel of y is 0 with probability
    Phi(-x / s) and 1 with probability Phi((x - 1) / s), where s is the level and Phi the standard normal distribution;
    in between its density is that of N(x, s^2). No denoiser has a lower mean squared error on noisy copies of `images`;
    for others, the average is only as good as its nearest images. Computed in float32.

    Args:
        images: Uint8 [M, H, W, C].
        level: The standard deviation, > 0.
    """
    import tensorflow as tf

    x = np.arange(256) / 255
    # log p(y | x) for 0 < y < 1, up to a constant that depends on y alone, is (y x - x^2 / 2) / s^2. Written for all y,
    # and corrected where y is 0 or 1, it needs three matrix products instead of four.
    at_zero = special.log_ndtr(-x / level) + x**2 / (2 * level**2)
    at_one = special.log_ndtr((x - 1) / level) + (x**2 / 2 - x) / level**2
    tables = tf.constant(np.stack([at_zero, at_one, x / level**2], axis=1), tf.float32)
    half_squares = tf.constant(x**2 / (2 * level**2), tf.float32)
    flat = images.reshape(len(images), -1)
    blocks = [tf.constant(flat[start : start + 2000]) for start in range(0, len(images), 2000)]

    def denoise(noisy: np.ndarray) -> np.ndarray:
        y = noisy.reshape(len(noisy), -1, 1)
        factors = np.concatenate([y == 0, y == 1, y], axis=2).astype(np.float32).reshape(len(noisy), -1)
        # Sums over the images so far, relative to the highest likelihood so far.
        highest = tf.fill([len(noisy), 1], -np.inf)
        total, weighted = tf.zeros([len(noisy), 1]), tf.zeros([len(noisy), flat.shape[1]])
        for pixels in blocks:
            indices = tf.cast(pixels, tf.int32)
            values = tf.reshape(tf.gather(tables, indices), [len(pixels), -1])
            log_likelihood = tf.matmul(factors, values, transpose_b=True)
            log_likelihood -= tf.reduce_sum(tf.gather(half_squares, indices), axis=1)
            new_highest = tf.maximum(highest, tf.reduce_max(log_likelihood, axis=1, keepdims=True))
            likelihood, rescale = tf.exp(log_likelihood - new_highest), tf.exp(highest - new_highest)
            total = total * rescale + tf.reduce_sum(likelihood, axis=1, keepdims=True)
            weighted = weighted * rescale + tf.matmul(likelihood, tf.cast(pixels, tf.float32) / 255)
            highest = new_highest
        return (weighted / total).numpy().reshape(noisy.shape)

    return denoise
