"""The classical filters and the score table."""
# ruff: noqa: E402 -- modules that need the extra are imported only if it is installed

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

for package in ("scipy", "skimage", "bm3d"):
    pytest.importorskip(package, reason="needs the extra `baselines`")

from scipy import stats

from dae import config as config_module
from dae.analysis import classical, score_table
from dae.analysis.classical import (
    FILTERS,
    TunedFilter,
    denoise,
    fit_correction,
    mean_psnr,
    posterior_mean,
    tune_filter,
)
from dae.analysis.denoisers import NO_DENOISING, Score, Trial, rows, score
from dae.analysis.statistics import interval
from dae.config import RunConfig
from dae.data.datasets import Splits
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.evaluation.metrics import METRICS
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report

CONFIG = RunConfig(noise_level=0.5)


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


@pytest.fixture(scope="module")
def few(mnist) -> Splits:
    return Splits(mnist.train[:2000], mnist.validation[:50], mnist.test[:60])


def copy_of(run: Path, folder: Path, **changes: object) -> Path:
    """Copy a run to `folder`, and change its config.json."""
    shutil.copytree(run, folder)
    config = replace(config_module.read(run / "config.json"), **changes)  # type: ignore[arg-type]
    (folder / "config.json").write_text(config_module.to_json(config))
    return folder


def test_the_row_of_a_run_has_the_metrics_of_its_report(tiny_run, mnist):
    (result,) = score(score_table.run_trials({"tiny": [tiny_run]}, CONFIG, mnist.test))
    (row,) = rows([result])
    report = read_report(tiny_run)
    assert {name: row[name][0] for name in METRICS} == {
        name: pytest.approx(report[f"test_{name}"], rel=1e-5) for name in METRICS
    }
    assert (row["denoiser"], row["test_images"], row["weights"]) == ("tiny", 10_000, report["parameters"])
    assert row["seconds_to_train"] == pytest.approx(sum(line["seconds"] for line in read_metrics(tiny_run)))
    assert row["milliseconds_per_image"] > 0
    assert row["details"] == "600 training images; seeds: 0"
    batch = next(iter(evaluation_batches(mnist.test, CONFIG, "test")))
    np.testing.assert_allclose(result.samples, load_model(tiny_run)(batch.noisy[:10]), atol=1e-5)


def test_runs_of_several_seeds_share_a_row_and_each_has_the_noise_of_the_table_and_of_its_seed(tiny_run, few, tmp_path):
    other = copy_of(tiny_run, tmp_path / "seed-7", seed=7)
    blind = copy_of(tiny_run, tmp_path / "blind", noise_level=(0.1, 0.8), clip_noise=False)
    groups = {"tiny": [tiny_run, other], "blind": [blind]}
    first, second, third = results = list(score(score_table.run_trials(groups, CONFIG, few.test)))
    assert first.metrics["psnr"] != second.metrics["psnr"]  # the same weights, other noise
    assert first.metrics == third.metrics
    row, _ = rows(results)
    assert row["psnr"] == interval([first.metrics["psnr"], second.metrics["psnr"]])
    assert (row["seeds"], row["details"]) == (2, "600 training images; seeds: 0, 7")


def test_runs_are_grouped_by_settings_other_than_the_seed_and_the_machine(tiny_run, tmp_path):
    def run(name: str, **changes: object) -> Path:
        return copy_of(tiny_run, tmp_path / name, **changes)

    same = [run("a", shards=1, onednn=False), run("b", seed=1, checkpoint_every=5)]
    different = [run("wide", width=2), *(run(f"other-{digit}", loss=f"a.py:bright@{digit * 64}") for digit in "12")]
    again = run("again", seed=1)  # no further sample of the seed 1
    groups = score_table.group_runs([*same, *different, again])
    assert list(groups.values()) == [same, *([config] for config in different)]
    for name, flags in zip(groups, ("--batch-size 64", "--width 2", "--loss bright", "--loss bright"), strict=True):
        assert flags in name


@pytest.mark.parametrize(
    ("preset", "changes", "name"),
    [
        ("tutorial", {}, "tutorial"),
        ("best", {"seed": 3, "shards": 2, "epochs": 12}, "best --epochs 12"),
        ("fast", {"noise_level": (0.1, 0.8)}, "fast --noise-level 0.1 0.8"),
        ("fast", {"loss": f"/somewhere/losses.py:bright@{'0' * 64} + mse"}, "fast --loss bright + mse"),
    ],
)
def test_a_run_is_named_by_a_preset_and_the_flags_that_differ(preset, changes, name, tmp_path):
    (tmp_path / "config.json").write_text(config_module.to_json(config_module.preset(preset, **changes)))
    assert score_table.group_runs([tmp_path]) == {name: [tmp_path]}


def test_unfinished_runs_and_those_of_other_images_are_rejected(tiny_run, tmp_path):
    score_table.check_test_images(tiny_run, CONFIG)
    fashion = copy_of(tiny_run, tmp_path / "fashion", dataset="fashion_mnist")
    with pytest.raises(UsageError, match=r"--runs: .*fashion.* expected --dataset mnist"):
        score_table.check_test_images(fashion, CONFIG)
    (fashion / "report.json").unlink()
    with pytest.raises(UsageError, match="not a finished run"):
        score_table.check_test_images(fashion, CONFIG)


def test_filters_and_the_posterior_mean_have_scores(few, pool):
    filters = score_table.filter_trials(["median"], CONFIG, few, 20, 30, pool)
    median, posterior = score([*filters, score_table.posterior_trial(CONFIG, few, 30)])
    (batch,) = evaluation_batches(few.test[:30], CONFIG, "test")
    noisy, clean = batch.noisy.numpy(), batch.clean.numpy()
    assert median.milliseconds > 0
    assert median.metrics["psnr"] > classical.mean_psnr(clean, noisy) + 4
    (row,) = rows([median])
    assert (row["test_images"], row["details"][:7]) == (30, "size 3;")
    expected = classical.posterior_mean(few.train.pixels, 0.5)(noisy)
    assert posterior.metrics["psnr"] == pytest.approx(classical.mean_psnr(clean, expected), abs=1e-3)
    np.testing.assert_allclose(posterior.samples, expected[:10], atol=1e-5)
    assert "2,000 training images" in rows([posterior])[0]["details"]


def test_the_table_is_saved_as_markdown_with_the_protocol_csv_and_a_picture(few, tmp_path):
    def result(name: str, psnr: float, milliseconds: float = 1.0, **facts: Any) -> Score:
        trial = Trial(name, lambda noisy: noisy, few.test, CONFIG, facts=facts)
        return Score(trial, dict.fromkeys(METRICS, psnr), milliseconds, np.zeros((10, 28, 28, 1), np.float32))

    facts: dict[str, Any] = {"weights": 4385, "seconds_to_train": 12.0, "details": "seeds: 0, 1"}
    scores = [result("best --epochs 12", psnr, milliseconds=0.0512, **facts) for psnr in (17.0, 18.0)]
    scores += [result(NO_DENOISING, 9.25), result("median", 14.5)]
    text = score_table.save(tmp_path, scores, few, 20)
    assert (tmp_path / "score_table.md").read_text() == text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in cells] == ["denoiser", "---", NO_DENOISING, "median", "best --epochs 12"]
    both = interval([17.0, 18.0])
    assert cells[4][1:3] == ["60", f"17.50 [{both.low:.2f}, {both.high:.2f}]"]
    assert cells[4][7:] == ["4,385", "12", "0.0512"]
    assert cells[2][7:] == ["", "", "1"]
    for words in ("11 x 11", "clip(x + 0.5 n, 0, 1)", "20 validation images", "No test image", "thread", "keras 3"):
        assert words in text[text.index("## Protocol") :]
    with open(tmp_path / "score_table.csv") as file:
        first, _, last = csv.DictReader(file)
    assert [float(last[name]) for name in ("psnr", "psnr_low", "psnr_high")] == list(both)
    assert (last["seeds"], last["seconds_to_train"], first["psnr_low"]) == ("2", "12.0", "")
    height, width, _ = tf.io.decode_png((tmp_path / "score_table.png").read_bytes()).shape
    assert height > 4 * 90  # three denoisers and clean images
    assert width > 10 * 90
