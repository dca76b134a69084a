# ruff: noqa: E402 -- modules that need the extra are imported only if it is installed
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

for package in ("scipy", "skimage", "bm3d"):
    pytest.importorskip(package, reason="needs the extra `baselines`")

from scipy import stats

from dae.analysis import classical
from dae.analysis.classical import (
    FILTERS,
    TunedFilter,
    denoise,
    fit_correction,
    mean_psnr,
    posterior_mean,
    tune_filter,
)
from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(1) as one_thread:
        yield one_thread


def noisy_and_clean(images: Images, level: float, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images with the noise of an evaluation, and clean."""
    batch = next(iter(evaluation_batches(images[:count], RunConfig(noise_level=level), split)))
    return batch.noisy.numpy(), batch.clean.numpy()


@pytest.fixture(scope="module")
def digits(mnist) -> tuple[np.ndarray, np.ndarray]:
    """Ten validation digits with noise of level 0.5, and clean."""
    return noisy_and_clean(mnist.validation, 0.5, "validation", 10)


def first_of_grid(name: str) -> dict:
    """Return the first values of a method's grid, at level 0.5."""
    first = {parameter: values[0] for parameter, values in FILTERS[name][1].items()}
    return {parameter: value / 2 if isinstance(value, float) else value for parameter, value in first.items()}


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_the_posterior_mean_equals_bayes_rule_pixel_by_pixel(level, mnist):
    noisy, _ = noisy_and_clean(mnist.test, level, "test", 5)
    prior = mnist.train.pixels[:300]
    expected = []
    for y in noisy.astype(np.float64):
        x = prior / 255
        inside = stats.norm.logpdf(y, x, level)
        log = np.where(y == 0, stats.norm.logcdf(0, x, level), np.where(y == 1, stats.norm.logsf(1, x, level), inside))
        log = log.sum(axis=(1, 2, 3))
        weights = np.exp(log - log.max())
        expected.append(np.tensordot(weights / weights.sum(), x, 1))
    # At level 0.2, logarithms of about 3,000 leave three digits of a weight in float32.
    np.testing.assert_allclose(posterior_mean(prior, level)(noisy), expected, atol=2e-3 if level == 0.2 else 2e-4)


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_denoises(name, digits, pool):
    noisy, clean = digits
    parameters = first_of_grid(name) | ({"size": 3} if name == "median" else {})
    raw = denoise(pool, TunedFilter(name, parameters), noisy)
    denoised = denoise(pool, TunedFilter(name, parameters, *fit_correction(raw, clean)), noisy)
    assert denoised.shape == noisy.shape
    assert 0 <= denoised.min() < denoised.max() <= 1
    assert mean_psnr(clean, denoised) > mean_psnr(clean, noisy) + 4
    assert mean_psnr(clean, denoised) > mean_psnr(clean, raw) + 0.5


def test_channels_are_filtered_separately_and_images_stay_in_order(digits, pool):
    grey = np.concatenate([digits[0]] * 9)[:86]  # several blocks, of different sizes
    colour = np.concatenate([grey, grey[::-1], 1 - grey], axis=-1)
    tuned = TunedFilter("median", {"size": 3})
    filtered = denoise(pool, tuned, colour)
    for channel in range(3):
        alone = denoise(pool, tuned, colour[..., channel : channel + 1])
        np.testing.assert_array_equal(filtered[..., channel : channel + 1], alone)
    np.testing.assert_array_equal(filtered[..., 1], filtered[::-1, ..., 0])


def test_processes_filter_as_threads_do(digits, pool):
    tuned = TunedFilter("total variation", {"weight": 0.25}, 1.8, -0.4)
    with classical.processes(2) as two:
        np.testing.assert_array_equal(denoise(two, tuned, digits[0]), denoise(pool, tuned, digits[0]))


def test_tuning_chooses_the_best_combination_of_the_grid(digits, pool, monkeypatch):
    grid = {"sigma": (0.2, 0.57, 1.6), "strength": (0.22,), "patch_size": (3, 5), "patch_distance": (5,)}
    monkeypatch.setitem(FILTERS, "non-local means", (classical.non_local_means, grid))
    tuned = tune_filter(pool, "non-local means", 0.5, *digits)
    assert tuned.parameters["sigma"] == 0.57 / 2
    assert tuned.milliseconds > 0
    assert mean_psnr(digits[1], denoise(pool, tuned, digits[0])) == pytest.approx(tuned.psnr, abs=1e-3)
    for patch_size in (3, 5):
        parameters = tuned.parameters | {"patch_size": patch_size}
        raw = denoise(pool, TunedFilter(tuned.name, parameters), digits[0])
        assert mean_psnr(digits[1], classical.correct(raw, *fit_correction(raw, digits[1]))) < tuned.psnr + 0.01
    assert f"sigma 0.285, strength 0.11, patch size {tuned.parameters['patch_size']}, patch distance 5" in str(tuned)


def test_the_correction_is_the_least_squares_fit():
    clean = np.random.default_rng(0).random((4, 11, 11, 1))
    assert fit_correction((clean + 0.3) / 2, clean) == pytest.approx((2, -0.3))
    assert fit_correction(np.full_like(clean, 0.7), clean) == pytest.approx((0, clean.mean()))
