"""experiments/score_table.py: classical filters, the posterior mean and the table."""

import runpy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import EXPERIMENTS, run_subprocess
from scipy import ndimage, stats

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches

score_table = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "score_table.py")))


def noisy_and_clean(images: Images, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return five images with the noise of an evaluation, and clean."""
    batch = next(iter(evaluation_batches(images[:5], RunConfig(noise_level=level), "test")))
    return batch.noisy.numpy(), batch.clean.numpy()


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_the_posterior_mean_equals_bayes_rule_pixel_by_pixel(level, mnist):
    noisy, _ = noisy_and_clean(mnist.test, level)
    prior = mnist.train.pixels[:300] / np.float32(255)
    expected = []
    for y in noisy.astype(np.float64):
        x = prior.astype(np.float64)
        inside = stats.norm.logpdf(y, x, level)
        log = np.where(y == 0, stats.norm.logcdf(0, x, level), np.where(y == 1, stats.norm.logsf(1, x, level), inside))
        log = log.sum(axis=(1, 2, 3))
        weights = np.exp(log - log.max())
        expected.append((weights[:, None, None, None] * x).sum(axis=0) / weights.sum())
    denoised = score_table.posterior_mean(prior, level)(noisy)
    np.testing.assert_allclose(denoised, expected, atol=2e-3 if level == 0.2 else 2e-4)


def test_a_filter_is_tuned_and_corrected_on_the_given_images(mnist):
    noisy, clean = (images[..., 0] for images in noisy_and_clean(mnist.validation, 0.5))
    filters = [partial(ndimage.median_filter, size=size) for size in (1, 3, 9)]
    denoise = score_table.tuned(filters, noisy, clean)
    denoised = denoise(noisy[..., np.newaxis])[..., 0]
    raw = np.stack([filters[1](image) for image in noisy])
    assert denoise.keywords["function"] is filters[1]
    assert score_table.mean_psnr(clean, denoised) > score_table.mean_psnr(clean, raw) + 0.5
    assert denoised.min() >= 0
    assert denoised.max() <= 1
    error = np.mean((denoise.keywords["gain"] * raw + denoise.keywords["offset"] - clean) ** 2)
    for gain, offset in ((1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01)):
        changed = denoise.keywords["gain"] * gain * raw + denoise.keywords["offset"] + offset
        assert np.mean((changed - clean) ** 2) > error


@pytest.mark.slow
def test_the_table_has_a_row_for_each_denoiser(tmp_path):
    for package in ("skimage", "bm3d"):
        pytest.importorskip(package, reason="needs the extra `baselines`")
    flags = ["--presets", "good", "--seeds", 1, "--tune-examples", 2, "--classical-examples", 10]
    done = run_subprocess("score_table.py", *flags, cwd=tmp_path)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert {row[0]: row[2] for row in rows[2:]} == {
        "no denoising": "10,000",
        **dict.fromkeys(("median", "total variation", "non-local means", "BM3D", "posterior mean"), "10"),
        "`--preset good`": "10,000",
    }
    assert rows[-1][0] == "`--preset good`"
    assert 0 < float(rows[-1][1]) < 10
    assert float(rows[-1][4]) > 20
