# ruff: noqa: E402 -- modules that need the extra are imported only if it is installed
import csv
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, TINY

for package in ("scipy", "skimage", "bm3d"):
    pytest.importorskip(package, reason="needs the extra `baselines`")

from dae import config as config_module
from dae.analysis import classical, score_table, score_table_report
from dae.analysis.noise_sweep import BASELINE, Denoiser, sweep
from dae.analysis.score_table import COLUMNS, NO_DENOISING, POSTERIOR_MEAN, LevelResult, Row, noisy_and_clean
from dae.analysis.statistics import estimate
from dae.config import RunConfig
from dae.data.datasets import Splits
from dae.errors import Interrupted, RunError, UsageError
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report

CONFIG = RunConfig()


@pytest.fixture(scope="module")
def few(mnist) -> Splits:
    return Splits(mnist.train[:2000], mnist.validation[:50], mnist.test[:60])


def copy_of(run: Path, folder: Path, **changes: object) -> Path:
    """Copy a run to `folder`, and change its config.json."""
    shutil.copytree(run, folder)
    config = replace(config_module.read(run / "config.json"), **changes)  # type: ignore[arg-type]
    (folder / "config.json").write_text(config_module.to_json(config))
    return folder


def test_the_noise_of_an_image_does_not_depend_on_how_many_are_measured(mnist):
    noisy, clean = noisy_and_clean(mnist.test, CONFIG, "test", 1200)
    assert noisy.shape == clean.shape == (1200, 28, 28, 1)
    np.testing.assert_array_equal(clean, mnist.test.pixels[:1200].astype(np.float32) / 255)
    for count in (7, 700):
        np.testing.assert_array_equal(noisy_and_clean(mnist.test, CONFIG, "test", count)[0], noisy[:count])


def test_the_row_of_the_noisy_images_equals_the_baseline_of_a_noise_sweep(mnist, tiny_run):
    denoiser = Denoiser("tiny", load_model(tiny_run), CONFIG, mnist.test[:700])
    baseline = next(sweep([denoiser], ("gaussian",), (0.5,)))
    assert baseline.denoiser == BASELINE
    row = score_table.noisy_row(CONFIG, mnist.test[:700])
    assert row.images == 700
    for metric in COLUMNS:
        assert row.metrics[metric] == pytest.approx([baseline.metrics[metric]], rel=1e-5)


def test_the_row_of_a_run_has_the_metrics_of_its_report(tiny_run, mnist):
    row = score_table.run_row("tiny", [tiny_run], CONFIG, mnist.test)
    report = read_report(tiny_run)
    assert row.metrics == {metric: [pytest.approx(report[f"test_{metric}"], rel=1e-5)] for metric in COLUMNS}
    assert row.weights == report["parameters"]
    assert row.seconds == [sum(line["seconds"] for line in read_metrics(tiny_run))]
    assert row.milliseconds is not None
    assert row.milliseconds > 0
    model = load_model(tiny_run)
    np.testing.assert_allclose(row.shown, model(noisy_and_clean(mnist.test, CONFIG, "test", 10)[0]), atol=1e-5)
    assert "600 training images; seed 0; " in row.details
    assert "`--batch-size 64`" in row.details
    assert "--shards" not in row.details


def test_runs_of_several_seeds_share_a_row_and_each_has_the_noise_of_its_seed(tiny_run, few, tmp_path):
    other = copy_of(tiny_run, tmp_path / "seed-7", seed=7)
    one, two = (score_table.run_row("r", [run], CONFIG, few.test) for run in (tiny_run, other))
    row = score_table.run_row("tiny", [tiny_run, other], CONFIG, few.test)
    assert row.metrics == {metric: one.metrics[metric] + two.metrics[metric] for metric in COLUMNS}
    assert one.metrics["psnr"] != two.metrics["psnr"]  # the same weights, other noise
    assert "seeds 0, 7; " in row.details


def test_a_run_that_was_trained_on_a_range_is_measured_at_the_level_of_the_table(tiny_run, few, tmp_path):
    blind = copy_of(tiny_run, tmp_path / "blind", noise_level=(0.1, 0.8), clip_noise=False)
    rows = [score_table.run_row("r", [run], CONFIG, few.test) for run in (tiny_run, blind)]
    assert rows[0].metrics == rows[1].metrics
    assert "`--noise-level 0.1 0.8`" in rows[1].details
    assert [score_table.trained_on_a_range([run], CONFIG) for run in (tiny_run, blind)] == [False, True]


def test_a_model_file_has_a_row(tiny_run, few):
    row = score_table.model_row("file", tiny_run / "model.h5", CONFIG, few.test)
    of_run = score_table.run_row("run", [tiny_run], CONFIG, few.test)
    assert row.metrics == {metric: pytest.approx(of_run.metrics[metric], rel=1e-5) for metric in COLUMNS}
    assert (row.name, row.weights, row.seconds) == ("file", of_run.weights, [])


def test_runs_are_grouped_by_settings_other_than_the_seed_and_the_machine(tiny_run, tmp_path):
    def run(name: str, **changes: object) -> Path:
        return copy_of(tiny_run, tmp_path / name, **changes)

    same = [run("a/seed-0", shards=1, onednn=False), run("a/seed-1", seed=1, checkpoint_every=5)]
    others = [run("wide", width=2), run("b/a", loss="mse", seed=1)]
    again = run("again", seed=1)  # no further sample of the seed 1
    assert score_table.group_runs([*same, *others, again]) == {"a": same, "wide": others[:1], "a-2": others[1:]}


def test_unfinished_runs_and_those_of_other_images_are_refused(tiny_run, tmp_path):
    score_table.check_test_images(tiny_run, CONFIG)
    fashion = copy_of(tiny_run, tmp_path / "fashion", dataset="fashion_mnist")
    with pytest.raises(UsageError, match=r"--runs: .*fashion.* expected --dataset mnist"):
        score_table.check_test_images(fashion, CONFIG)
    (fashion / "report.json").unlink()
    with pytest.raises(UsageError, match="not a finished run"):
        score_table.check_test_images(fashion, CONFIG)


def test_a_folder_with_another_run_or_one_that_cannot_be_written_is_refused(tiny_run, tmp_path):
    score_table.check_run(tiny_run, TINY)
    with pytest.raises(UsageError, match="--batch-size was 64, now 128"):
        score_table.check_run(tiny_run, replace(TINY, batch_size=128))
    score_table.check_run(tmp_path / "new", TINY)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output: .*cannot be written"):
        score_table.make_folder(tmp_path / "file" / "below")


def test_filters_and_posterior_mean_have_rows(few):
    with ThreadPoolExecutor(1) as executor:
        tuned = score_table.tune("median", CONFIG, few.validation, 20, executor)
        row = score_table.filter_row(tuned, CONFIG, few.test, 30, executor)
    noisy, clean = noisy_and_clean(few.test, CONFIG, "test", 30)
    assert (row.name, row.images, row.weights, row.details) == ("median", 30, None, str(tuned))
    assert row.metrics["psnr"][0] > classical.mean_psnr(clean, noisy) + 4
    posterior = score_table.posterior_row(CONFIG, few, 30)
    expected = classical.posterior_mean(few.train.pixels, 0.5)(noisy)
    assert posterior.metrics["psnr"] == pytest.approx([classical.mean_psnr(clean, expected)], abs=1e-3)
    np.testing.assert_allclose(posterior.shown, expected[:10], atol=1e-5)
    assert "2,000 training images" in posterior.details


@pytest.mark.slow
def test_the_table_at_several_levels(tiny_run, few, tmp_path):
    runs = [tiny_run, copy_of(tiny_run, tmp_path / "seed-1", seed=1)]
    with ThreadPoolExecutor(1) as executor:
        groups = {"tiny": runs}
        results = list(score_table.level_results(CONFIG, few, (0.2, 0.5), "total variation", groups, 10, 20, executor))
    by_cell = {(one.denoiser, one.level): one for one in results}
    names = (NO_DENOISING, "total variation", POSTERIOR_MEAN, "tiny")
    assert set(by_cell) == {(name, level) for name in names for level in (0.2, 0.5)}
    assert {one.denoiser: one.images for one in results} == dict(zip(names, (60, 20, 20, 60), strict=True))
    at_half = {name: by_cell[name, 0.5].psnr for name in names}
    row = score_table.run_row("tiny", runs, CONFIG, few.test)
    assert at_half["tiny"].mean == pytest.approx(row.estimate("psnr").mean, rel=1e-5)
    assert "weight " in by_cell["total variation", 0.2].details
    assert at_half["tiny"].low < at_half["tiny"].mean < at_half["tiny"].high
    assert at_half[NO_DENOISING].mean == pytest.approx(score_table.noisy_row(CONFIG, few.test).metrics["psnr"][0], 1e-5)
    for name in (NO_DENOISING, "total variation"):
        assert by_cell[name, 0.2].psnr.mean > at_half[name].mean
    assert by_cell["total variation", 0.2].psnr.mean > by_cell[NO_DENOISING, 0.2].psnr.mean


def row_of(name: str, *psnr: float, **fields: object) -> Row:
    """Return a row with these PSNRs, one per seed."""
    metrics = {metric: list(psnr) for metric in COLUMNS}
    return Row(name, 60, metrics, np.zeros((10, 28, 28, 1), np.float32), **fields)  # type: ignore[arg-type]


@pytest.fixture
def saved(few, tiny_run, tmp_path) -> tuple[str, Path]:
    """A table of three rows, and of two denoisers at two levels, and its folder."""
    rows = [
        row_of("net", 17.0, 18.0, weights=4385, seconds=[10.0, 14.0], milliseconds=0.0512, details="seeds 0, 1"),
        row_of(NO_DENOISING, 9.25),
        row_of("median", 14.5, milliseconds=1.0),
    ]
    levels = [LevelResult(NO_DENOISING, level, 60, estimate([9.0])) for level in (0.1, 0.5)]
    levels += [LevelResult("net", level, 60, estimate([17.0, 18.0])) for level in (0.1, 0.5)]
    return score_table_report.save(tmp_path, rows, CONFIG, few, [tiny_run], 20, levels), tmp_path


def test_the_markdown_is_sorted_and_states_the_protocol(saved):
    text, folder = saved
    assert (folder / "score_table.md").read_text() == text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in cells[:5]] == ["denoiser", "---", NO_DENOISING, "median", "net"]
    assert {len(row) for row in cells[:5]} == {10}
    interval = estimate([17.0, 18.0])
    assert cells[4][1:3] == ["60", f"17.50 [{interval.low:.2f}, {interval.high:.2f}]"]
    assert cells[4][7:] == ["4,385", "12", "0.0512"]
    assert cells[2][7:] == ["", "", ""]
    protocol = text[text.index("## Protocol") : text.index("## Noise levels")]
    for words in ("11 x 11", "clip(x + 0.5 n, 0, 1)", "20 validation images", "No test image", "thread", "bm3d 4"):
        assert words in protocol
    assert cells[5] == ["PSNR, dB, at level", "test images", "0.1", "0.5"]
    assert cells[7] == [NO_DENOISING, "60", "9.00", "9.00"]
    assert "one network for all levels" in text


def test_the_csv_files_hold_every_value(saved):
    _, folder = saved
    with open(folder / "score_table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["denoiser"] for row in rows] == [NO_DENOISING, "median", "net"]
    interval = estimate([17.0, 18.0])
    assert [float(rows[2][name]) for name in ("psnr", "psnr_low", "psnr_high")] == [
        interval.mean,
        interval.low,
        interval.high,
    ]
    assert (rows[2]["seeds"], rows[2]["seconds_to_train"], rows[0]["psnr_low"]) == ("2", "12.0", "")
    with open(folder / "noise_levels.csv") as file:
        levels = [(row["denoiser"], row["level"], row["psnr"]) for row in csv.DictReader(file)]
    assert levels[0] == (NO_DENOISING, "0.1", "9.0")
    assert levels[-1] == ("net", "0.5", "17.5")


def test_the_pictures_are_drawn(saved):
    _, folder = saved
    height, width, _ = tf.io.decode_png((folder / "score_table.png").read_bytes()).shape
    assert height > 4 * 90  # noisy, clean and two denoisers
    assert width > 10 * 90
    assert (folder / "noise_levels.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_without_runs_for_a_range_says_so(few, tmp_path):
    levels = [LevelResult(NO_DENOISING, 0.5, 60, estimate([9.0]))]
    text = score_table_report.save(tmp_path, [row_of(NO_DENOISING, 9.25)], CONFIG, few, [], 20, levels)
    assert "no run was trained for a range" in text
    assert "Seconds to train" not in text


@pytest.mark.slow
def test_training_in_a_process_passes_an_interruption_on_and_resumes(tmp_path):
    folder, small = tmp_path / "run", ("--train-examples", "2000", "--validation-examples", "100", "--epochs", "4")

    def interrupt() -> None:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="repeat the command") as caught:
        score_table.train_in_process(EXPERIMENTS / "run.py", folder, small)
    thread.join()
    assert caught.value.signal_number == signal.SIGINT
    assert not (folder / "report.json").exists()
    score_table.train_in_process(EXPERIMENTS / "run.py", folder, small)
    assert len(read_metrics(folder)) == 4
    assert (folder / "report.json").exists()
    with pytest.raises(RunError, match=re.escape(f"{folder}: run.py stopped with exit status 2")):
        score_table.train_in_process(EXPERIMENTS / "run.py", folder, ("--batch-size", "5"))
