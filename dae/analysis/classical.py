"""Denoising without training: filters that are tuned on validation images, and the exact posterior mean.

The filters are made for noise of mean 0, but clipped noise brightens black and darkens white. So each is followed by
`gain * denoised + offset`, fitted to the clean validation images by least squares, and by clipping to [0, 1]. Source:
Foi, Clipped Noisy Images: Heteroskedastic Modeling and Practical Denoising (2009), which inverts the bias exactly.

Needs the extra `baselines`. Importing this module does not load TensorFlow, because processes that filter need none.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.pool import Pool
from typing import Any

import bm3d as bm3d_package
import numpy as np
from scipy import ndimage, special
from skimage import restoration
from tqdm import tqdm


def non_local_means(
    image: np.ndarray, sigma: float, strength: float, patch_size: int, patch_distance: int
) -> np.ndarray:
    """Return for each pixel the mean of those at most `patch_distance` away, weighted by how similar their patches are.

    Images here and in `bm3d` are float [H, W] of any range. The weight of a patch with mean squared difference d is
    exp(-max(d - 2 sigma^2, 0) / strength^2). Source: scikit-image's `denoise_nl_means`; Buades, Coll and Morel, A
    Non-Local Algorithm for Image Denoising (2005).
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


def bm3d_for(level: float) -> Callable[[Any], np.ndarray]:
    """Return BM3D, with the authors' settings for Gaussian noise of this level, as a function of images [N, H, W, C].

    In colour, it is their form for RGB, which matches blocks by their luminance.
    """

    def denoise(noisy: Any) -> np.ndarray:
        by_channels = {1: bm3d_package.bm3d, 3: bm3d_package.bm3d_rgb}[noisy.shape[-1]]
        return np.stack([by_channels(image.squeeze(), level).reshape(image.shape) for image in np.asarray(noisy)])

    return denoise


# Functions of images of one channel, with the values of their parameters that tuning tries; floats are multiples of the
# noise level. Total variation is the minimum over u of |u - image|^2 / 2 + weight * (total variation of u), iterated
# until it changes by less than 1e-5. Source: Chambolle, An Algorithm for Total Variation Minimization and Applications
# (2004).
FILTERS: dict[str, tuple[Callable[..., np.ndarray], dict[str, tuple]]] = {
    "median": (ndimage.median_filter, {"size": (1, 3, 5, 7)}),
    "total variation": (
        functools.partial(restoration.denoise_tv_chambolle, eps=1e-5, max_num_iter=1000),
        {"weight": (0.35, 0.40, 0.46, 0.53, 0.61, 0.70)},
    ),
    "non-local means": (
        non_local_means,
        {"sigma": (0.57, 0.64), "strength": (0.22, 0.28), "patch_size": (3, 5, 7), "patch_distance": (5, 7, 9, 11)},
    ),
    "BM3D": (bm3d, {"sigma": (0.49, 0.53, 0.57, 0.61)}),
}


@dataclasses.dataclass(frozen=True)
class TunedFilter:
    """A filter with the parameters that are best on validation images, followed by its correction."""

    name: str
    """A key of FILTERS."""
    parameters: dict[str, Any]
    """Floats are in units of brightness."""
    gain: float = 1.0
    offset: float = 0.0
    psnr: float = math.nan
    """Mean PSNR, in dB, on the validation images."""
    milliseconds: float = math.nan
    """The time that a validation image takes on one core: the median."""

    def __str__(self) -> str:
        values = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.parameters.items())
        correction = f"gain {self.gain:.3f}, offset {self.offset:+.3f}"
        return f"{values}; {correction}; {self.psnr:.2f} dB on validation images"


def processes(count: int) -> Pool:
    """Return a pool of `count` processes for `tune_filter` and `denoise`, to be used as a context manager."""
    # TensorFlow's threads do not survive a fork. Ctrl-C is for this process alone, which then ends the others.
    return multiprocessing.get_context("spawn").Pool(count, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def denoise(pool: Pool, tuned: TunedFilter, noisy: np.ndarray) -> np.ndarray:
    """Return filtered and corrected images, float32 [N, H, W, C] in [0, 1]."""
    filtered, _ = _filter(pool, tuned.name, tuned.parameters, noisy)
    return correct(filtered, tuned.gain, tuned.offset)


def _filter(pool: Pool, name: str, parameters: Mapping[str, Any], noisy: np.ndarray) -> tuple[np.ndarray, float]:
    """Return filtered images, each channel for itself, and the median of the milliseconds per image."""
    filter_image = functools.partial(_filter_image, functools.partial(FILTERS[name][0], **parameters))
    results = list(tqdm(pool.imap(filter_image, noisy, 20), name, len(noisy), leave=False, disable=None))
    filtered, seconds = zip(*results, strict=True)
    return np.stack(filtered), 1000 * float(np.median(seconds))


def _filter_image(function: Callable[[np.ndarray], np.ndarray], noisy: np.ndarray) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    filtered = np.stack([function(channel) for channel in np.moveaxis(noisy, -1, 0)], axis=-1)
    return filtered.astype(np.float32), time.perf_counter() - started


def tune_filter(pool: Pool, name: str, level: float, noisy: np.ndarray, clean: np.ndarray) -> TunedFilter:
    """Return a filter with the parameters of its grid that have the highest mean PSNR after correction.

    `pool` is from `processes`; `level`, the noise level, is greater than 0; `noisy` and `clean` are validation images,
    float32 [N, H, W, C] in [0, 1], with noise and without it.
    """
    grid = FILTERS[name][1]
    tried = []
    for values in itertools.product(*grid.values()):
        multiples = dict(zip(grid, values, strict=True))
        parameters = {key: value * level if isinstance(value, float) else value for key, value in multiples.items()}
        filtered, milliseconds = _filter(pool, name, parameters, noisy)
        gain, offset = fit_correction(filtered, clean)
        psnr = mean_psnr(clean, correct(filtered, gain, offset))
        tried.append(TunedFilter(name, parameters, gain, offset, psnr, milliseconds))
    return max(tried, key=lambda tuned: tuned.psnr)


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


def posterior_mean(images: np.ndarray, level: float) -> Callable[[Any], np.ndarray]:
    """Return the denoiser E[x | y] for clipped Gaussian noise, if each of the images is as likely to be the clean one.

    E[x | y] = sum_i p(y | x_i) x_i / sum_i p(y | x_i), over all images x_i. A pixel of y is 0 with probability
    Phi(-x / s) and 1 with probability Phi((x - 1) / s), where s is the level and Phi the standard normal distribution;
    in between its density is that of N(x, s^2). No denoiser has a lower mean squared error on noisy copies of `images`;
    for others, the average is only as good as its nearest images. Computed in float32.

    `images` are uint8 [M, H, W, C], and `level` is greater than 0.
    """
    import tensorflow as tf

    x = np.arange(256) / 255
    # For 0 < y < 1, log p(y | x) is (y x - x^2 / 2) / s^2, up to a constant that depends on y alone.
    logarithms = special.log_ndtr(-x / level), special.log_ndtr((x - 1) / level), x / level**2, -(x**2) / (2 * level**2)
    tables = tf.constant(np.stack(logarithms, axis=1), tf.float32)
    flat = images.reshape(len(images), -1)
    blocks = [tf.constant(flat[start : start + 2000]) for start in range(0, len(images), 2000)]

    def denoised(noisy: np.ndarray | tf.Tensor) -> np.ndarray:
        y = np.asarray(noisy).reshape(len(noisy), -1, 1)
        inside = (y > 0) & (y < 1)
        factors = np.concatenate([y == 0, y == 1, inside * y, inside], axis=2)
        factors = factors.astype(np.float32).reshape(len(noisy), -1)
        log_likelihoods = []
        for pixels in blocks:
            values = tf.reshape(tf.gather(tables, tf.cast(pixels, tf.int32)), [len(pixels), -1])
            log_likelihoods.append(tf.matmul(factors, values, transpose_b=True))
        probabilities = tf.split(tf.nn.softmax(tf.concat(log_likelihoods, axis=1)), list(map(len, blocks)), axis=1)
        # Block by block, because all images as floats would take four times their memory.
        means = (
            tf.matmul(probability, tf.cast(pixels, tf.float32) / 255)
            for probability, pixels in zip(probabilities, blocks, strict=True)
        )
        return tf.add_n(list(means)).numpy().reshape(noisy.shape)

    return denoised
