import csv
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EXPERIMENTS, TINY, run_in_process

from dae import config as config_module
from dae.analysis import comparison
from dae.analysis.comparison import (
    Comparison,
    Run,
    conclusion,
    constant_score,
    read_run,
)
from dae.config import RunConfig
from dae.errors import Interrupted, RunError, warn
from dae.evaluation.metrics import METRICS
from dae.training.task import prepare
from dae.workdir.workdir import append_metrics, read_metrics, read_report


def comparison_of(failed: tuple[tuple[str, int], ...] = (), **psnr: list[float]) -> Comparison:
    """Return a comparison of losses with these PSNRs, one per seed, and their negatives as other metrics.

    The runs of `failed` losses and seeds did not learn.
    """
    runs = []
    for loss, values in psnr.items():
        for seed, value in enumerate(values):
            metrics = {f"{split}_{name}": -value for split in ("validation", "test") for name in METRICS}
            metrics |= {"validation_psnr": value, "test_psnr": value}
            runs.append(Run(loss, seed, 3, (loss, seed) not in failed, 60.0, metrics))
    return Comparison("loss", list(psnr), list(range(len(values))), list(METRICS), runs)


def sentence(text: str, loss: str) -> str:
    """Return the only line of a conclusion that compares `loss`."""
    lines = [line for line in text.splitlines() if line.startswith(f"{loss} ")]
    (line,) = [line for line in lines if "did not learn" not in line]
    return line


@pytest.mark.parametrize("metric", ["psnr", "mse"])  # more dB is better, more error is worse
def test_conclusion_claims_only_significant_differences(metric):
    result = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05], c=[10.1, 11.8, 11.2], d=[9.0, 10.9, 9.95])
    text = conclusion(result, metric)
    ranking = text.splitlines()[0]
    assert "validation images over 3 seeds" in ranking
    assert [ranking.index(f"{loss} (") for loss in "bcad"] == sorted(ranking.index(f"{loss} (") for loss in "bcad")
    found = result.estimates(f"validation_{metric}")["b"]
    mean, low, high = found.difference
    interval = f"{mean:+.3g}, 95 % interval [{low:+.3g}, {high:+.3g}]"
    assert sentence(text, "b") == f"b is better than a: {interval}, corrected p = {found.p_corrected:.2g}."
    assert "no significant difference" in sentence(text, "c")
    assert "d is worse than a" in sentence(text, "d")
    assert "did not learn" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_conclusion_of_fewer_than_three_seeds_claims_no_difference(seeds):
    text = conclusion(comparison_of(a=[10.0, 10.1][:seeds], b=[11.0, 11.1001][:seeds]), "psnr")
    assert text.splitlines()[0].count("b (11") == 1
    assert "no conclusion, which takes at least 3 seeds (--seeds)" in sentence(text, "b")
    for word in ("better", "significant", "p ="):
        assert word not in text


@pytest.mark.parametrize("mixed", [["a"], ["b"], ["a", "b"]])
def test_nothing_is_concluded_about_losses_that_were_mostly_mixed_with_bce(mixed):
    result = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05], c=[11.0, 13.1, 12.05])
    text = conclusion(replace(result, mixed=mixed), "psnr")
    assert f"because {' and '.join(mixed)} was minimized by itself in less than half" in sentence(text, "b")
    assert "--bce-steps" in sentence(text, "b")
    assert ("c is better than a" in text) == ("a" not in mixed)


def test_conclusion_says_for_which_learning_rates_it_holds():
    same = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05])
    assert "the same learning rate for all" in conclusion(same, "psnr")
    assert "the same learning rate" not in conclusion(replace(same, field="learning_rate"), "psnr")
    tunings = {"a": {0.001: 10.0, 0.0032: 11.0, 0.01: 9.0}, "b": {0.001: 10.0, 0.0032: 11.0, 0.01: 12.0}}
    text = conclusion(replace(same, tunings=tunings), "psnr")
    assert "a 0.0032, b 0.01" in text
    assert "the same learning rate" not in text
    (edge,) = [line for line in text.splitlines() if "at the edge" in line]
    assert "learning rate of b " in edge


def test_runs_that_did_not_learn_are_counted_and_left_out():
    psnr = {"a": [10.0, 12.0, 11.0, 5.0], "b": [11.0, 13.1, 12.05, 13.05], "c": [10.5, 3.0, 4.0, 14.0]}
    result = comparison_of((("a", 3), ("c", 1), ("c", 2)), **psnr)
    found = result.estimates("validation_psnr")
    assert [found[name].mean.mean for name in "abc"] == pytest.approx([11, np.mean(psnr["b"]), 12.25])
    assert found["b"].difference.mean == pytest.approx(np.mean([1.0, 1.1, 1.05]))  # in the seeds in which both learned
    text = conclusion(result, "psnr")
    assert "b (12.3), c (12.25), a (11)" in text.splitlines()[0]
    failed = [line for line in text.splitlines() if "did not learn" in line]
    assert [line.split(" seeds")[0] for line in failed] == ["a did not learn in 1 of 4", "c did not learn in 2 of 4"]
    assert "b is better than a" in sentence(text, "b")
    assert "no conclusion" in sentence(text, "c")  # both learned with seed 0 only


def test_nothing_is_claimed_if_the_first_value_never_learned():
    failed = tuple(("a", seed) for seed in range(3))
    text = conclusion(comparison_of(failed, a=[1.0, 1.2, 1.1], b=[11.0, 13.1, 12.05]), "psnr")
    assert "from best to worst: b (12.05)." in text.splitlines()[0]
    assert "a did not learn in 3 of 3 seeds" in text
    for word in ("is better", "is worse", "significant", "nan"):
        assert word not in text
    assert "from best to worst: none." in conclusion(comparison_of(failed, a=[1.0, 1.2, 1.1]), "psnr")


@pytest.mark.parametrize(("metric", "best"), [("psnr", "median"), ("mse", "mean")])
def test_constant_score_is_that_of_the_best_constant_image(metric, best, tmp_path):
    # A tenth is bright, which the mean sees and the median does not.
    bright = np.random.default_rng(0).random((80, 12, 12)) < 0.1
    images = np.where(bright, 200, np.random.default_rng(1).integers(0, 9, bright.shape)).astype(np.uint8)
    images[:, :6] = images[:, :1, :1]  # whole halves are bright or dark, so that PSNRs differ between images
    np.savez(tmp_path / "few.npz", x_train=images, x_test=images[:10])
    task = prepare(RunConfig(data=str(tmp_path / "few.npz"), validation_examples=30))
    train, validation = images[:50] / 255, images[50:] / 255
    scores = {}
    for name, constant in (("mean", train.mean(axis=0)), ("median", np.median(train, axis=0))):
        mse = ((validation - constant) ** 2).mean(axis=(1, 2))
        scores[name] = (-10 * np.log10(mse) if metric == "psnr" else mse).mean()
    assert (max if metric == "psnr" else min)(scores, key=lambda name: scores[name]) == best
    assert constant_score(task, metric) == pytest.approx(scores[best], rel=1e-5)


@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("mse", -1)])
def test_a_run_has_the_metrics_of_its_kept_epoch_and_learned_if_it_is_better_than_the_constant(metric, sign, tiny_run):
    line, report = min(read_metrics(tiny_run), key=lambda line: line["validation_loss"]), read_report(tiny_run)
    value = line[f"validation_{metric}"]
    for constant, learned in ((value - 1e-6 * sign, True), (value, False)):
        run = read_run("bce", 0, tiny_run, TINY, list(METRICS), metric, constant)
        assert (run.learned, run.epoch) == (learned, line["epoch"])
        assert run.metrics == {name: (line | report)[name] for name in run.metrics}
        assert len(run.metrics) == 2 * len(METRICS)


def test_the_files_hold_every_run_and_the_statistics(tmp_path):
    result = comparison_of(
        (("b", 0), ("b", 1), ("b", 2)), a=[10.0, 12.0, 11.0], b=[1.0, 2.0, 1.0], c=[10.5, 12.7, 11.6]
    )
    diverged = Run("c", 3, 0, False, 1.0, {})
    tunings = {name: {0.001: 9.0, 0.0032: math.nan} for name in "abc"}
    comparison.save(replace(result, runs=[diverged, *result.runs], tunings=tunings), "psnr", tmp_path, TINY)
    first, *rows = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())
    assert (first["loss"], first["seed"], first["learned"], first["test_psnr"]) == ("c", "3", "False", "")
    assert [(row["loss"], int(row["seed"])) for row in rows] == [(run.name, run.seed) for run in result.runs]
    assert [float(row["validation_psnr"]) for row in rows] == [run.metrics["validation_psnr"] for run in result.runs]
    assert [row["learned"] for row in rows] == 3 * ["True"] + 3 * ["False"] + 3 * ["True"]
    tables = (tmp_path / "comparison.md").read_text()
    assert all(words in tables for words in conclusion(result, "psnr").splitlines()[:-1])
    lines = [line.strip("| ").split(" | ") for line in tables.splitlines()]
    assert ["`b`", *["did not learn"] * len(METRICS)] in lines
    psnr = 1 + list(METRICS).index("psnr")
    found = result.estimates("test_psnr")["c"]
    mean, low, high = found.mean
    assert any(line[0] == "`c`" and line[psnr] == f"{mean:.2f} [{low:.2f}, {high:.2f}]" for line in lines)
    mean, low, high = found.difference
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] p {found.p:.2g}, {found.p_corrected:.2g}"
    assert any(line[0] == "`c` - `a`" and line[psnr] == text for line in lines)
    assert ["`a`", "9.0000", "diverged"] in lines
    assert "--train-examples 600" in tables
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


ARGUMENTS = ["--data", "few.npz", "--validation-examples", "128", "--batch-size", "64", "--epochs", "1"]
ARGUMENTS += ["--output", "out", "--bce-steps", "0"]


@pytest.fixture
def folder(tmp_path, mnist) -> Path:
    """A folder with a few digits."""
    np.savez(tmp_path / "few.npz", x_train=mnist.train.pixels[:384], x_test=mnist.test.pixels[:64])
    return tmp_path


@pytest.fixture
def trained(monkeypatch, tiny_run) -> list[tuple[RunConfig, Path]]:
    """The configurations and folders of all runs that a comparison asks for; each is a copy of a run that learned."""
    calls: list[tuple[RunConfig, Path]] = []

    def copy_instead(config: RunConfig, run_dir: Path, **options: Any) -> dict[str, float]:
        calls.append((config, run_dir))
        run_dir.mkdir(parents=True)
        shutil.copy(tiny_run / "report.json", run_dir)
        for line in read_metrics(tiny_run):
            append_metrics(run_dir, line | {"validation_psnr": 20 + 0.01 * len(calls) ** 2})
        return read_report(run_dir)

    monkeypatch.setattr(comparison, "train", copy_instead)
    return calls


def test_values_of_any_field_can_be_compared(folder, trained):
    arguments = [*ARGUMENTS, "--field", "noise-level", "--values", "0.3", "[0.1, 0.8]", "--seeds", "2", "--seed", "3"]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    assert done.stderr == ""
    assert [(config.noise_level, config.seed) for config, _ in trained] == [
        (level, seed) for seed in (3, 4) for level in (0.3, (0.1, 0.8))
    ]
    rows = csv.DictReader((folder / "out" / "comparison.csv").read_text().splitlines())
    assert [(row["noise_level"], row["seed"]) for row in rows] == [
        (name, seed) for seed in "34" for name in ("0.3", "0.1-0.8")
    ]
    assert "0.1-0.8, seed 3: kept epoch 3" in done.stdout


def test_warnings_name_the_loss_and_are_printed_once_and_written(folder, trained):
    arguments = [*ARGUMENTS, "--bce-steps", "3", "--losses", "bce", "mse", "--seeds", "3"]  # of four steps
    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    problem = "--bce-steps: BCE is part of the loss in 3 of 4 steps; lower it, or train longer"
    assert done.stderr == f"warning: mse: {problem}\n"
    for text in (done.stdout, (folder / "out" / "comparison.md").read_text()):
        assert f"mse: warning: {problem}" in text
        assert "mse and bce: no conclusion, because mse was minimized by itself in less than half" in text


def test_tuning_starts_from_a_preset_and_has_a_seed_of_its_own(folder, trained, monkeypatch):
    def fake_tune(config: RunConfig, metric: str, rates: int, folder: Path) -> dict[float, float]:
        tuned.append((config.loss, config.seed, config.learning_rate, config.optimizer, metric, rates, folder))
        return {0.0001: 11.0, 0.01: 12.0 if config.loss == "bce" else 10.0, 1.0: math.nan}

    tuned: list[tuple] = []
    monkeypatch.setattr(comparison, "tune_learning_rate", fake_tune)
    arguments = [*ARGUMENTS, "--preset", "fast", "--losses", "bce", "mse", "--seeds", "2", "--seed", "5", "--tune"]
    done = run_in_process("compare_losses.py", *arguments, "--rates", "5", "--metric", "ssim", cwd=folder)
    assert done.stderr == ""
    out = Path("out")
    assert tuned == [(name, 5, 0.02, "soap", "ssim", 5, out / name / "tuning") for name in ("bce", "mse")]
    assert [(config.loss, config.seed, config.learning_rate, run) for config, run in trained] == [
        (name, seed, rate, out / name / "tuned" / f"seed-{seed}")
        for seed in (6, 7)
        for name, rate in (("bce", 0.01), ("mse", 0.0001))
    ]
    assert "bce 0.01, mse 0.0001" in done.stdout


@pytest.mark.slow
def test_a_killed_comparison_ends_with_the_same_result(folder, files, monkeypatch):
    """Killed at the second of three rates; to learn takes more steps than a test has time for."""
    monkeypatch.setattr(comparison, "constant_score", lambda task, metric: 0.0)
    flags = ["--losses", "bce", "--tune", "--rates", "3", "--seeds", "1", "--model", f"{files}/networks.py:plain"]
    arguments = [*ARGUMENTS, *flags, "--output"]
    command = [sys.executable, str(EXPERIMENTS / "compare_losses.py"), *arguments, "killed"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while not (folder / "killed" / "bce/tuning/rate-0.001" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (folder / "killed").rglob("report.json")}
    results = []
    for output in ("killed", "whole"):
        run_in_process("compare_losses.py", *arguments, output, cwd=folder)
        rows = list(csv.DictReader((folder / output / "comparison.csv").read_text().splitlines()))
        for row in rows:
            del row["seconds"]
        results.append((rows, (folder / output / "comparison.md").read_text()))
    assert results[0] == results[1]
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_an_interruption_says_to_repeat_the_command_and_warnings_are_printed_at_once(folder, monkeypatch):
    def interrupted(*arguments: Any, **options: Any) -> None:
        for message in (
            "hot",
            "hot",
            "--bce-steps: BCE is part of the loss in 3 of 4 steps; lower it, or train longer",
        ):
            warn(message)
        print("at work", file=sys.stderr)
        raise Interrupted(signal.SIGTERM, "stopped", Path("runs/one-of-them"))

    monkeypatch.setattr(comparison, "train", interrupted)
    arguments = [*ARGUMENTS, "--bce-steps", "3", "--losses", "mse", "--seeds", "2"]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder, status=143)
    _, *lines = done.stderr.splitlines()  # the first is the warning of the configuration
    assert lines[:2] == ["warning: mse, seed 0: hot", "at work"]
    assert lines[2].endswith("stopped; repeat the command to continue")


def test_a_run_that_fails_says_to_repeat_the_command(folder, monkeypatch):
    def failed(*arguments: Any, **options: Any) -> None:
        raise RunError("disk full", Path("out/mse/seed-0"))

    monkeypatch.setattr(comparison, "train", failed)
    done = run_in_process("compare_losses.py", *ARGUMENTS, "--losses", "mse", "--seeds", "2", cwd=folder, status=1)
    assert done.stderr.endswith("disk full; repeat the command to continue\n")


@pytest.mark.parametrize(("run", "flags"), [("mse/seed-1", []), ("mse/tuning/rate-0.01", ["--tune"])])
def test_an_output_folder_of_another_comparison_is_rejected_before_the_first_run(run, flags, folder, monkeypatch):
    monkeypatch.setattr(comparison, "train", None)
    monkeypatch.setattr(comparison, "tune_learning_rate", None)
    same: dict[str, Any] = {"data": str(folder / "few.npz"), "validation_examples": 128, "epochs": 1, "bce_steps": 0}
    config = RunConfig(loss="mse", learning_rate=0.01 if flags else 0.001, batch_size=32, **same)
    (folder / "out" / run).mkdir(parents=True)
    (folder / "out" / run / "config.json").write_text(config_module.to_json(config))
    before = sorted(folder.rglob("*"))
    arguments = [*ARGUMENTS, "--losses", "bce", "mse", "--seeds", "2", *flags]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder, status=2)
    assert done.stderr.count("\n") == 1
    assert f"out/{run} is another run (--batch-size was 32" in done.stderr
    assert sorted(folder.rglob("*")) == before
