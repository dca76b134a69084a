# ruff: noqa: E402 -- modules that need the extra are imported only if it is installed
import dataclasses
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest

for package in ("scipy", "skimage", "bm3d"):
    pytest.importorskip(package, reason="needs the extra `baselines`")

from scipy import stats

from dae.analysis import classical
from dae.analysis.classical import METHODS, Method, Tuned, denoise, fit_correction, mean_psnr, posterior_mean, tune
from dae.analysis.score_table import noisy_and_clean
from dae.config import RunConfig


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1) as one_thread:
        yield one_thread


@pytest.fixture(scope="module")
def digits(mnist) -> tuple[np.ndarray, np.ndarray]:
    """Ten validation digits with noise of level 0.5, and clean."""
    return noisy_and_clean(mnist.validation, RunConfig(), "validation", 10)


def first_of_grid(name: str) -> dict:
    """Return the first values of a method's grid, at level 0.5."""
    first = {parameter: values[0] for parameter, values in METHODS[name].grid.items()}
    return {parameter: value / 2 if isinstance(value, float) else value for parameter, value in first.items()}


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_the_posterior_mean_equals_bayes_rule_pixel_by_pixel(level, mnist):
    noisy, _ = noisy_and_clean(mnist.test, RunConfig(noise_level=level), "test", 5)
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


def test_the_posterior_mean_does_not_depend_on_the_order_of_the_images(mnist, digits):
    prior = mnist.train.pixels[:4500]  # three blocks
    shuffled = prior[np.random.default_rng(0).permutation(len(prior))]
    np.testing.assert_allclose(
        posterior_mean(shuffled, 0.5)(digits[0]), posterior_mean(prior, 0.5)(digits[0]), atol=1e-4
    )


def test_the_posterior_mean_finds_the_clean_image_if_that_is_a_training_image(mnist):
    noisy, clean = noisy_and_clean(mnist.train[:500], RunConfig(noise_level=0.1), "test", 20)
    assert np.abs(posterior_mean(mnist.train.pixels[:2500], 0.1)(noisy) - clean).max() < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_each_filter_denoises(name, digits, executor):
    noisy, clean = digits
    parameters = first_of_grid(name) | ({"size": 3} if name == "median" else {})
    raw, milliseconds = denoise(executor, Tuned(name, parameters, 1.0, 0.0, np.nan, []), noisy)
    gain, offset = fit_correction(raw, clean)
    denoised, _ = denoise(executor, Tuned(name, parameters, gain, offset, np.nan, []), noisy)
    assert denoised.shape == noisy.shape
    assert 0 <= denoised.min() < denoised.max() <= 1
    assert milliseconds > 0
    assert mean_psnr(clean, denoised) > mean_psnr(clean, noisy) + 4
    assert mean_psnr(clean, denoised) > mean_psnr(clean, raw) + 0.5


def test_channels_are_filtered_separately_and_images_stay_in_order(digits, executor):
    grey = np.concatenate([digits[0]] * 9)[:86]  # several blocks, of different sizes
    colour = np.concatenate([grey, grey[::-1], 1 - grey], axis=-1)
    tuned = Tuned("median", {"size": 3}, 1.0, 0.0, np.nan, [])
    filtered, _ = denoise(executor, tuned, colour)
    for channel in range(3):
        alone, _ = denoise(executor, tuned, colour[..., channel : channel + 1])
        np.testing.assert_array_equal(filtered[..., channel : channel + 1], alone)
    np.testing.assert_array_equal(filtered[..., 1], filtered[::-1, ..., 0])


def test_processes_filter_as_threads_do(digits, executor):
    tuned = Tuned("total variation", {"weight": 0.25}, 1.8, -0.4, np.nan, [])
    with classical.processes(2) as two:
        np.testing.assert_array_equal(denoise(two, tuned, digits[0])[0], denoise(executor, tuned, digits[0])[0])


def tune_total_variation(
    weights: tuple, digits: tuple[np.ndarray, np.ndarray], executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> Tuned:
    """Tune the weight from `weights`, multiples of the level, on."""
    method = dataclasses.replace(METHODS["total variation"], grid={"weight": weights})
    monkeypatch.setitem(METHODS, "total variation", method)
    return tune(executor, "total variation", 0.5, *digits)


@pytest.mark.parametrize("weights", [(0.2, 0.24), (1.0, 1.2)])
def test_tuning_leaves_the_grid_until_the_best_value_is_not_at_its_edge(weights, digits, executor, monkeypatch):
    tuned = tune_total_variation(weights, digits, executor, monkeypatch)
    assert tuned.at_edge == []
    for factor in (1 / 1.2, 1.2):
        weight = tuned.parameters["weight"] * factor
        (neighbour, _) = denoise(executor, Tuned(tuned.name, {"weight": weight}, 1.0, 0.0, np.nan, []), digits[0])
        corrected = classical.correct(neighbour, *fit_correction(neighbour, digits[1]))
        assert mean_psnr(digits[1], corrected) < tuned.psnr
    denoised, _ = denoise(executor, tuned, digits[0])
    assert mean_psnr(digits[1], denoised) == pytest.approx(tuned.psnr, abs=1e-3)


def test_a_best_value_at_the_edge_is_reported(digits, executor, monkeypatch):
    monkeypatch.setattr(classical, "MAX_WIDENINGS", 1)
    tuned = tune_total_variation((3.0, 4.0), digits, executor, monkeypatch)
    assert tuned.at_edge == ["weight"]
    assert tuned.parameters["weight"] == pytest.approx(0.5 * 3**2 / 4)
    assert "at the edge of the grid: weight" in str(tuned)


def test_tuning_tries_all_combinations(digits, executor, monkeypatch):
    grid = {"sigma": (0.2, 0.57, 1.6), "levels": (1, 2)}
    monkeypatch.setitem(METHODS, "wavelets", Method(classical.wavelets, grid))
    tuned = tune(executor, "wavelets", 0.5, *digits)
    assert tuned.parameters == {"sigma": 0.57 / 2, "levels": 2}
    assert tuned.at_edge == ["levels"]  # which cannot be widened


def test_the_correction_is_the_least_squares_fit():
    clean = np.random.default_rng(0).random((4, 11, 11, 1))
    assert fit_correction((clean + 0.3) / 2, clean) == pytest.approx((2, -0.3))
    assert fit_correction(np.full_like(clean, 0.7), clean) == pytest.approx((0, clean.mean()))
