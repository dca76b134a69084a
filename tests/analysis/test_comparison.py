import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from helpers import EXPERIMENTS, TINY, run_in_process

from dae import analysis
from dae import config as config_module
from dae.analysis import comparison, comparison_report
from dae.analysis.comparison import Comparison, candidates, compare, conclusion, constant_score, gather, score_by_losses
from dae.analysis.tuning import Tuning
from dae.config import PRESETS, RunConfig, canonicalize
from dae.data.pipeline import evaluation_batches
from dae.errors import Interrupted, UsageError
from dae.evaluation.metrics import METRICS
from dae.losses.losses import mae
from dae.reporting.logger import Logger
from dae.training.task import prepare
from dae.workdir.workdir import append_metrics, read_metrics, read_report


def comparison_of(learned: dict[str, list[bool]] | None = None, **psnr: list[float]) -> Comparison:
    """Return a comparison of losses with these PSNRs, one per seed, and their negatives as MSEs."""
    mse = {loss: [-value for value in values] for loss, values in psnr.items()}
    metrics: dict[str, dict[str, list[float]]] = {"psnr": psnr, "mse": mse}
    seeds = list(range(len(next(iter(psnr.values())))))
    return Comparison(
        "loss",
        list(psnr),
        seeds,
        runs={},
        epochs={loss: [1 for _ in seeds] for loss in psnr},
        learned={loss: [True for _ in seeds] for loss in psnr} | (learned or {}),
        seconds=dict.fromkeys(psnr, 1.0),
        metrics={"validation": metrics},
    )


def sentence(text: str, loss: str) -> str:
    """Return the only line of a conclusion that starts with `loss`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{loss} ")]
    return line


@pytest.mark.parametrize("metric", ["psnr", "mse"])  # more dB is better, more error is worse
def test_conclusion_claims_only_significant_differences(metric):
    result = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05], c=[10.1, 11.8, 11.2], d=[10.0, 12.0, 11.0])
    text = conclusion(result, metric)
    ranking = text.splitlines()[0]
    assert "validation" in ranking
    assert "3 seeds" in ranking
    assert [ranking.index(f"{loss} (") for loss in "bcad"] == sorted(ranking.index(f"{loss} (") for loss in "bcad")
    difference = result.differences("validation", metric)["b"]
    for value in (f"{difference.mean:+.3g}", f"[{difference.low:+.3g}, {difference.high:+.3g}]"):
        assert value in sentence(text, "b")
    assert f"p = {difference.p_corrected:.2g}" in sentence(text, "b")
    assert "b is better than a" in sentence(text, "b")
    assert "no significant difference" in sentence(text, "c")
    assert "identical" in sentence(text, "d")
    assert text.count("better") == 1
    assert "worse" not in text.replace("worst", "")
    assert "did not learn" not in text


def test_conclusion_names_a_worse_loss():
    text = conclusion(comparison_of(b=[11.0, 13.1, 12.05], a=[10.0, 12.0, 11.0]), "psnr")
    assert "a is worse than b" in sentence(text, "a")


def test_conclusion_of_one_seed_claims_no_difference():
    text = conclusion(comparison_of(a=[10.0], b=[11.0]), "psnr")
    assert "--seeds 3" in text
    assert "better" not in text
    assert "b (11), a (10)" in text


def test_conclusion_says_for_which_learning_rates_it_holds():
    same = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05])
    assert "the same learning rate for all" in conclusion(same, "psnr")
    assert "the same learning rate" not in conclusion(replace(same, field="learning_rate"), "psnr")
    tunings = {
        name: Tuning({0.001: 10.0, rate: 11.0}, {0.001: 1, rate: 2}, best=rate, is_at_edge=at_edge, seconds=3.0)
        for name, rate, at_edge in (("a", 0.0032, False), ("b", 0.1, True))
    }
    text = conclusion(replace(same, tunings=tunings), "psnr")
    assert "a 0.0032, b 0.1" in text
    assert "the same learning rate" not in text
    (edge,) = [line for line in text.splitlines() if "at the edge" in line]
    assert "learning rate of b " in edge


def test_runs_that_did_not_learn_are_counted_and_left_out():
    psnr = {"a": [10.0, 12.0, 11.0, 5.0], "b": [11.0, 13.1, 12.05, 13.05], "c": [10.5, 3.0, 4.0, 14.0]}
    learned = {"a": [True, True, True, False], "c": [True, False, False, True]}
    result = comparison_of(learned, **psnr)
    estimates, differences = result.estimates("validation", "psnr"), result.differences("validation", "psnr")
    assert {name: one.mean for name, one in estimates.items()} == pytest.approx(
        {"a": np.mean([10.0, 12.0, 11.0]), "b": np.mean(psnr["b"]), "c": np.mean([10.5, 14.0])}
    )
    assert differences["b"].mean == pytest.approx(np.mean([1.0, 1.1, 1.05]))  # in the seeds in which both learned
    assert differences["c"].mean == pytest.approx(0.5)
    assert np.isnan([differences["c"].low, differences["c"].high, differences["c"].p]).all()

    text = conclusion(result, "psnr")
    assert "b (12.3), c (12.25), a (11)" in text.splitlines()[0]
    failed = [line for line in text.splitlines() if "did not learn" in line]
    assert [line.split(" seeds")[0] for line in failed] == ["a did not learn in 1 of 4", "c did not learn in 2 of 4"]
    assert "b is better than a" in sentence(text, "b")
    assert " and a" not in sentence(text, "c")  # a single seed


def test_nothing_is_claimed_if_the_first_value_never_learned():
    result = comparison_of({"a": [False] * 3}, a=[1.0, 1.2, 1.1], b=[11.0, 13.1, 12.05], c=[11.5, 13.5, 12.6])
    text = conclusion(result, "psnr")
    assert "c (12.533), b (12.05)." in text.splitlines()[0]
    assert "a did not learn in 3 of 3 seeds" in text
    assert not [line for line in text.splitlines() if line.startswith(("b ", "c "))]
    for word in ("is better", "is worse", "significant", "identical", "nan"):
        assert word not in text


def test_ranking_is_empty_if_nothing_learned():
    text = conclusion(comparison_of({"a": [False], "b": [False]}, a=[1.0], b=[1.0]), "psnr")
    assert "from best to worst: none." in text
    assert "identical" not in text


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
def test_a_run_learned_if_its_kept_epoch_is_better_than_the_constant(metric, sign, tiny_run):
    line = min(read_metrics(tiny_run), key=lambda line: line["validation_loss"])
    value = line[f"validation_{metric}"]
    for constant, learned in ((value - 1e-6 * sign, True), (value, False), (value + 1e-6 * sign, False)):
        result = gather("loss", {"bce": [tiny_run]}, [0], {"bce": constant}, metric)
        assert result.learned == {"bce": [learned]}
        assert result.metrics["validation"][metric]["bce"] == [value]


def check_files(out: Path, names: list[str], field: str = "loss", seeds: Sequence[int] = (0, 1)) -> dict[str, list]:
    """Check a comparison's files against the reports of its runs, which learned; return the test PSNRs by name."""
    everything = json.loads((out / "comparison.json").read_text())
    assert (everything["field"], everything["names"], everything["seeds"]) == (field, names, list(seeds))
    for name, (number, seed) in itertools.product(names, enumerate(seeds)):
        run = out / name / ("tuned" if everything["tunings"] else "") / f"seed-{seed}"
        report = json.loads((run / "report.json").read_text())
        line = read_metrics(run)[report["epoch"] - 1]
        for metric in METRICS:
            assert everything["metrics"]["test"][metric][name][number] == report[f"test_{metric}"]
            assert everything["metrics"]["validation"][metric][name][number] == line[f"validation_{metric}"]
        assert everything["epochs"][name][number] == report["epoch"]
        assert everything["learned"][name][number]
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(METRICS) * len(names)
    tables = (out / "comparison.md").read_text()
    for row in rows:
        values = everything["metrics"][row["split"]][row["metric"]]
        mean = np.mean(values[row[field]])
        assert float(row["mean"]) == pytest.approx(mean)
        assert f" {mean:.4f}" + (" [" if len(seeds) > 1 else " |") in tables
        if row[field] != names[0]:
            assert float(row["difference_mean"]) == pytest.approx(mean - np.mean(values[names[0]]))
    for words in everything["conclusion"].splitlines():
        assert words in tables
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    return everything["metrics"]["test"]["psnr"]


def copy_run(run: Path, folder: Path, change: float = 0.0) -> None:
    """Make a copy of a finished run that kept its last epoch, with `change` added to its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "model.keras", folder)
    lines = read_metrics(run)
    last = {"epoch": len(lines)}
    report = {name: value + change for name, value in read_report(run).items()} | last
    (folder / "report.json").write_text(json.dumps(report))
    for line in lines:
        metrics = {name: value + change for name, value in line.items() if name.startswith("validation_")}
        append_metrics(folder, line | metrics | {"validation_loss": -line["epoch"]})


def test_save_writes_the_metrics_of_each_run_and_their_means(tiny_run, tmp_path):
    names = ["bce", "2xbce"]
    runs = {name: [tmp_path / name / f"seed-{seed}" for seed in (0, 1)] for name in names}
    for number, folder in enumerate(itertools.chain.from_iterable(runs.values())):
        copy_run(tiny_run, folder, change=0.01 * number**2)
    constants, configs = dict.fromkeys(names, 0.0), dict.fromkeys(names, TINY)
    comparison_report.save(gather("loss", runs, [0, 1], constants, "psnr"), "psnr", tmp_path, configs)
    check_files(tmp_path, names)

    one_seed = gather("loss", {name: folders[:1] for name, folders in runs.items()}, [0], constants, "psnr")
    comparison_report.save(one_seed, "psnr", tmp_path, configs)
    assert "--seeds 3" in (tmp_path / "comparison.md").read_text()
    assert "NaN" not in (tmp_path / "comparison.json").read_text()


def test_save_shows_which_runs_did_not_learn_and_writes_no_nan(tiny_run, tmp_path):
    runs = {name: [tmp_path / name / f"seed-{seed}" for seed in (0, 1)] for name in ("bce", "mse")}
    for number, folder in enumerate(itertools.chain.from_iterable(runs.values())):
        copy_run(tiny_run, folder, change=0.01 * number)
    result = gather("loss", runs, [0, 1], {"bce": 1000.0, "mse": 0.0}, "psnr")
    result = replace(
        result,
        scores={"bce": {"bce": math.nan, "mse": math.nan}, "mse": {"bce": 0.25, "mse": 0.125}},
        tunings={"bce": Tuning({0.001: 9.0, 0.0032: math.nan}, {0.001: 3, 0.0032: 1}, 0.001, True, 60.0)},
    )
    comparison_report.save(result, "psnr", tmp_path, dict.fromkeys(runs, TINY))
    for name in ("comparison.json", "comparison.csv"):
        assert "nan" not in (tmp_path / name).read_text().lower()
    everything = json.loads((tmp_path / "comparison.json").read_text())
    assert everything["learned"] == {"bce": [False, False], "mse": [True, True]}
    assert everything["scores"]["bce"] == {"bce": None, "mse": None}
    assert everything["tunings"]["bce"]["scores"] == {"0.001": 9.0, "0.0032": None}
    for row in everything["statistics"]:
        assert (row["mean"] is None) == (row["loss"] == "bce")
        if row["loss"] == "mse":
            assert (row["difference_mean"], row["difference_p"]) == (None, None)
    rows = [line.split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines()]
    heads = [number for number, row in enumerate(rows) if "did not learn" in row and "final runs" in row]
    column = rows[heads[0]].index("did not learn")
    assert [row[column] for row in rows[heads[0] + 2 : heads[0] + 4]] == ["2", "0"]
    bce = [row for row in rows if row[0] == "| `bce`" and row[1].startswith("did not learn")]
    assert len(bce) == 3  # of validation images, of test images, and scored by losses
    assert ["**9.0000** (3)", "diverged (1) |"] in [row[1:] for row in rows]


ARGUMENTS = ["--data", "few.npz", "--validation-examples", "128", "--batch-size", "64", "--epochs", "1"]
ARGUMENTS += ["--output", "out"]


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
        copy_run(tiny_run, run_dir, change=10 + 0.01 * len(calls) ** 2)
        return read_report(run_dir)

    monkeypatch.setattr(comparison, "train", copy_instead)
    return calls


def test_values_of_any_field_can_be_compared(folder, trained):
    arguments = [*ARGUMENTS, "--field", "noise-level", "--values", "0.3", "[0.1, 0.8]", "--seeds", "2", "--seed", "3"]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(config.noise_level, config.seed) for config, _ in trained] == [
        (level, seed) for seed in (3, 4) for level in (0.3, (0.1, 0.8))
    ]
    check_files(folder / "out", ["0.3", "0.1-0.8"], "noise_level", seeds=[3, 4])
    assert "0.1-0.8, seed 3: kept epoch 3" in done.stdout
    assert "trained on" not in (folder / "out" / "comparison.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "values", "names"),
    [
        ("optimizer", ["adam", "soap"], ["adam", "soap"]),
        ("width", ["1", "2"], ["1", "2"]),
        ("noise_level", ["0.3", "[0.1, 0.8]"], ["0.3", "0.1-0.8"]),
    ],
)
def test_values_of_any_field_are_trained(field, values, names, folder):
    # 16 steps: the first ten of soap are those of adam.
    arguments = [*ARGUMENTS, "--batch-size", "16", "--field", field, "--values", *values, "--seeds", "1"]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    check_success(done)
    reports = [json.loads((folder / "out" / name / "seed-0" / "report.json").read_text()) for name in names]
    assert reports[0]["test_psnr"] != reports[1]["test_psnr"]
    saved = [config_module.read(folder / "out" / name / "seed-0" / "config.json") for name in names]
    first, second = (getattr(config, field) for config in saved)
    assert replace(saved[1], **{field: first}) == saved[0]
    assert first != second
    rows = csv.DictReader((folder / "out" / "comparison.csv").read_text().splitlines())
    assert [row[field] for row in rows] == names * 2 * len(METRICS)


def test_candidates_differ_only_in_the_field_and_have_names_of_their_own():
    configs = candidates("loss", ["bce", "0.5*mse + bce", "bce"], TINY)
    assert list(configs) == ["bce", "0.5xmse+bce", "bce-2"]
    for config in configs.values():
        assert replace(config, loss="bce") == canonicalize(TINY)


def test_tuning_has_a_seed_of_its_own(folder, trained, monkeypatch):
    def fake_tune(config: RunConfig, metric: str, rates: int, folder: Path, progress: object) -> Tuning:
        tuned.append((config.loss, config.seed, config.learning_rate, metric, rates, folder))
        best = 0.01 if config.loss == "bce" else 0.0001
        return Tuning({best: 12.0, 1.0: math.nan}, {best: 1, 1.0: 1}, best, False, 60.0)

    tuned: list[tuple] = []
    monkeypatch.setattr(comparison, "tune", fake_tune)
    arguments = [*ARGUMENTS, "--losses", "bce", "mse", "--seeds", "2", "--seed", "5", "--tune", "--rates", "5"]
    done = run_in_process("compare_losses.py", *arguments, "--metric", "ssim", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    out = Path("out")
    assert tuned == [(name, 5, 0.001, "ssim", 5, out / name / "tuning") for name in ("bce", "mse")]
    assert [(config.loss, config.seed, config.learning_rate, run) for config, run in trained] == [
        (name, seed, rate, out / name / "tuned" / f"seed-{seed}")
        for seed in (6, 7)
        for name, rate in (("bce", 0.01), ("mse", 0.0001))
    ]
    check_files(folder / "out", ["bce", "mse"], seeds=[6, 7])
    assert "bce 0.01, mse 0.0001" in done.stdout
    tables = (folder / "out" / "comparison.md").read_text()
    assert "| `bce` |  | **12.0000** (1) | diverged (1) |" in tables
    assert "| `mse` | **12.0000** (1) |  | diverged (1) |" in tables
    assert "| `bce` | 2 | 1.0 | 2 | 0 | " in tables
    scores = json.loads((folder / "out" / "comparison.json").read_text())["scores"]
    lines = tables.splitlines()
    start = lines.index("| trained on | `bce` | `mse` |")
    assert lines[start + 2 : start + 4] == [
        f"| `{name}` | {scores[name]['bce']:.4f} | {scores[name]['mse']:.4f} |" for name in ("bce", "mse")
    ]
    assert scores["bce"]["mse"] != scores["bce"]["bce"]


@pytest.mark.parametrize(("flags", "first"), [([], 0), (["--tune"], 1), (["--seed", "8", "--tune"], 9)])
def test_seeds_are_fresh_after_tuning(flags, first, tmp_path, monkeypatch):
    def stop(field: str, configs: object, seeds: Sequence[int], metric: str, output: Path, rates: int | None) -> None:
        raise UsageError(f"{list(seeds)} {rates} {metric} {output}")

    monkeypatch.setattr(comparison, "compare", stop)
    done = run_in_process("compare_losses.py", "--losses", "bce", *flags, cwd=tmp_path)
    rates = 7 if flags else None
    assert f"{list(range(first, first + 5))} {rates} psnr runs/comparison\n" in done.stderr


def test_a_preset_is_where_all_flags_start_from(tmp_path, monkeypatch):
    def stop(field: str, configs: dict[str, RunConfig], *arguments: object) -> None:
        seen.update(configs)
        raise UsageError("enough")

    seen: dict[str, RunConfig] = {}
    monkeypatch.setattr(comparison, "compare", stop)
    run_in_process("compare_losses.py", "--preset", "fast", "--epochs", "3", "--losses", "bce", "mse", cwd=tmp_path)
    fast = canonicalize(replace(PRESETS["fast"], epochs=3))
    assert seen == {"bce": fast, "mse": replace(fast, loss="mse")}
    assert fast.optimizer == "soap"


def test_scores_are_the_losses_of_each_network_on_the_test_images(folder, tiny_run):
    config = canonicalize(
        replace(TINY, data=str(folder / "few.npz"), train_examples=None, validation_examples=128, clip_noise=False)
    )
    configs = candidates("loss", ["mse", "bce + 2*mae", "noise2noise"], config)
    tasks = {name: prepare(one) for name, one in configs.items()}
    names, seeds = list(configs), [0, 4]
    runs = {name: [folder / name / f"seed-{seed}" for seed in seeds] for name in names}
    for number, run in enumerate(itertools.chain.from_iterable(runs.values())):
        copy_run(tiny_run, run)
        model = keras.models.load_model(tiny_run / "model.keras")
        model.set_weights([weight * (1 - 0.05 * number) for weight in model.get_weights()])
        model.save(run / "model.keras")
    result = gather("loss", runs, seeds, dict.fromkeys(names, 0.0), "psnr")
    result.learned["bce+2xmae"][0] = False
    result.learned["noise2noise"][:] = [False, False]
    scores = score_by_losses(result, tasks)
    assert list(scores) == names

    def losses(run: Path, seed: int) -> dict[str, float]:
        batches = list(evaluation_batches(tasks["mse"].data.test, replace(config, seed=seed), "test"))
        noisy, clean = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
        denoised = keras.models.load_model(run / "model.keras").predict(noisy, verbose=0)
        assert len(clean) == 64
        bce = -(clean * np.log(denoised) + (1 - clean) * np.log(1 - denoised)).mean()
        return {"mse": ((clean - denoised) ** 2).mean(), "bce+2xmae": bce + 2 * mae(clean, denoised).numpy().mean()}

    first, second = (losses(run, seed) for run, seed in zip(runs["mse"], seeds, strict=True))
    assert scores["mse"] == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, rel=1e-4)
    assert first["mse"] != pytest.approx(second["mse"], rel=1e-3)
    assert scores["bce+2xmae"] == pytest.approx(losses(runs["bce+2xmae"][1], 4), rel=1e-4)
    assert list(scores["noise2noise"]) == ["mse", "bce+2xmae"]
    assert np.isnan(list(scores["noise2noise"].values())).all()


@pytest.mark.slow
def test_a_comparison_leaves_finished_runs_alone_and_a_loss_is_identical_to_itself(folder, all_learn):
    first, second = (folder / "out" / name / "seed-0" / "report.json" for name in ("bce", "bce-2"))
    done = run_in_process("compare_losses.py", *ARGUMENTS, "--losses", "bce", "--seeds", "1", cwd=folder)
    check_success(done)
    assert "epoch 1/1" not in done.stdout  # a line per run, not per epoch
    finished = first.stat().st_mtime_ns
    done = run_in_process("compare_losses.py", *ARGUMENTS, "--losses", "bce", "bce", "--seeds", "1", cwd=folder)
    check_success(done)
    assert first.stat().st_mtime_ns == finished
    assert first.read_text() == second.read_text()
    assert "identical" in sentence(done.stdout, "bce-2 and")


def check_success(done: subprocess.CompletedProcess) -> None:
    """Check that a comparison has succeeded; after the few steps of a test, networks may still return one image."""
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "nearly the same image" not in line] == []


@pytest.fixture
def all_learn(monkeypatch) -> None:
    """Count every run as one that learned, which takes more steps than a test has time for."""
    monkeypatch.setattr(comparison, "constant_score", lambda task, metric: 0.0)


def kill_once_there_is(file: Path, arguments: list[str], cwd: Path) -> None:
    """Start a comparison in another process, and kill it as soon as `file` exists."""
    command = [sys.executable, str(EXPERIMENTS / "compare_losses.py"), *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_comparison_resumes(folder, all_learn):
    out, arguments = folder / "out", [*ARGUMENTS, "--losses", "bce", "bce", "2*bce", "--seeds", "2"]
    # In the second of six runs, seconds before the last ends.
    kill_once_there_is(out / "bce-2" / "seed-0" / "config.json", arguments, folder)
    assert not (out / "comparison.json").exists()
    finished = (out / "bce" / "seed-0" / "report.json").stat().st_mtime_ns

    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    check_success(done)
    assert (out / "bce" / "seed-0" / "report.json").stat().st_mtime_ns == finished
    psnr = check_files(out, ["bce", "bce-2", "2xbce"])
    assert "identical" in sentence(done.stdout, "bce-2 and")
    assert psnr["bce"] == psnr["bce-2"]
    assert psnr["bce"][0] != psnr["bce"][1]
    # Adam divides by the scale of the gradient, up to its epsilon.
    assert psnr["2xbce"] == pytest.approx(psnr["bce"], abs=0.02)
    assert psnr["2xbce"] != psnr["bce"]


def without_seconds(value: Any) -> Any:
    """Return JSON data without the training times, and the folders."""
    if isinstance(value, dict):
        return {key: without_seconds(each) for key, each in value.items() if key not in ("seconds", "runs")}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_comparison_that_is_killed_while_tuning_ends_with_the_same_result(folder, all_learn):
    arguments = [*ARGUMENTS, "--epochs", "2", "--losses", "bce", "--seeds", "1", "--tune", "--rates", "3"]
    arguments += ["--train-examples", "128", "--output"]
    tuning = folder / "killed" / "bce" / "tuning"
    kill_once_there_is(tuning / "rate-0.001" / "config.json", [*arguments, "killed"], folder)  # the second of 3 rates
    assert not list((folder / "killed").rglob("report.json"))
    assert len(list(tuning.iterdir())) < 3
    for output in ("killed", "whole"):
        done = run_in_process("compare_losses.py", *arguments, output, cwd=folder)
        check_success(done)
    killed, whole = (json.loads((folder / output / "comparison.json").read_text()) for output in ("killed", "whole"))
    assert without_seconds(killed) == without_seconds(whole)
    assert whole["seeds"] == [1]
    assert len(whole["tunings"]["bce"]["scores"]) >= 3
    assert [path.parent.name for path in (folder / "whole").rglob("report.json")] == ["seed-1"]


@pytest.mark.parametrize(
    ("rates", "run"), [(None, "seed-0"), pytest.param(3, "tuning/rate-0.00032", marks=pytest.mark.slow)]
)
def test_an_interrupted_comparison_says_how_to_continue(rates, run, tmp_path, monkeypatch):
    def progress_and_signal(self: Logger, epoch: int, images: int, loss: Any) -> None:
        progress(self, epoch, images, loss)
        os.kill(os.getpid(), signal.SIGINT)

    progress = Logger.progress
    monkeypatch.setattr(Logger, "progress", progress_and_signal)
    config = replace(TINY, train_examples=100, epochs=1)
    with pytest.raises(Interrupted, match=rf"bce/{run}.*repeat the command") as caught:
        compare("loss", {"bce": config}, [0], "psnr", tmp_path, rates)
    assert caught.value.signal_number == signal.SIGINT
    assert list((tmp_path / "bce" / run / "checkpoints" / "latest").glob("ckpt-1.index"))


FIELD = ["--field", "width", "--values"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "bce", "mes"], ["--loss: ", "'mes'", "did you mean 'mse'"]),
        (["--losses", "bce", "mse +* bce"], ["--loss: ", "'mse +* bce'", "'* bce'"]),
        (["--losses", "bce", "--metric", "psnrr"], ["--metric: ", "'psnrr'", "did you mean 'psnr'"]),
        (["--losses", "bce", "--seeds", "0"], ["--seeds: ", "got 0"]),
        (["--losses", "bce", "--validation-examples", "0"], ["--validation-examples: "]),
        (["--losses", "bce", "--preset", "tutorial"], ["--validation-examples: "]),
        (["--losses", "--loss", "mse"], ["--losses: "]),
        ([], ["--losses: "]),
        (["--losses", "bce", "--loss", "mse"], ["--losses: "]),
        (["--values", "1", "2"], ["--values: ", "--field"]),
        (["--losses", "bce", "--values", "1"], ["--values: ", "--field"]),
        (["--field", "width"], ["--values: "]),
        ([*FIELD, "1", "--losses", "bce"], ["--values: "]),
        (["--field", "widht", "--values", "1"], ["--field: ", "'widht'", "did you mean 'width'"]),
        (["--field", "seed", "--values", "1", "2"], ["--field: ", "--seeds"]),
        ([*FIELD, "1", "x"], ["--width: ", "expected int", "'x'"]),
        ([*FIELD, "1", "1.5"], ["--width: ", "expected int", "1.5"]),
        ([*FIELD, "1", "0"], ["--width: ", "got 0"]),
        (["--field", "optimizer", "--values", "adam", "saop"], ["--optimizer: ", "did you mean 'soap'"]),
        (["--field", "schedule", "--values", "constant", "cosin"], ["--schedule: ", "did you mean 'cosine'"]),
        (["--field", "validation_examples", "--values", "64", "0"], ["--validation-examples: "]),
        (["--losses", "bce", "--tune", "--rates", "4"], ["--rates: ", "odd", "got 4"]),
        (["--losses", "bce", "--tune", "--rates", "1"], ["--rates: ", "got 1"]),
        (["--field", "learning-rate", "--values", "0.1", "--tune"], ["--tune: ", "--field"]),
        (["--field", "learning_rate", "--values", "0.1", "--tune"], ["--tune: ", "--field"]),
    ],
)
def test_a_mistake_is_found_before_the_first_run(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train", None)
    monkeypatch.setattr(comparison, "tune", None)
    done = run_in_process("compare_losses.py", *arguments, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("splits", [{"x_train": 5, "x_test": 5}, {"x_train": 8}], ids=["with test", "without"])
@pytest.mark.parametrize("arguments", [["--losses", "bce"], [*FIELD, "1"], ["--losses", "bce", "mse", "--tune"]])
def test_a_data_set_too_small_for_validation_images_is_refused(arguments, splits, tmp_path, mnist):
    np.savez(tmp_path / "five.npz", **{name: mnist.train.pixels[:count] for name, count in splits.items()})
    done = run_in_process("compare_losses.py", *arguments, "--data", "five.npz", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "--validation-examples: 0" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["five.npz"]


@pytest.mark.parametrize(
    ("run", "change", "flags"),
    [
        ("mse/seed-1", {"batch_size": 32}, []),
        ("mse/seed-1", {"learning_rate": 0.01}, []),
        ("mse/seed-7", {"noise_level": 0.25}, []),
        ("mse/seed-1", {"batch_size": 32}, ["--tune"]),
        ("mse/tuning/rate-0.01", {"learning_rate": 0.01, "width": 2}, ["--tune"]),
    ],
)
def test_an_output_folder_of_another_comparison_is_refused_before_the_first_run(
    run, change, flags, folder, monkeypatch
):
    monkeypatch.setattr(comparison, "train", None)
    monkeypatch.setattr(comparison, "tune", None)
    same = {"data": str(folder / "few.npz"), "validation_examples": 128, "noise_level": 0.5, "batch_size": 64}
    same |= {"epochs": 1, "loss": "mse"}
    config = RunConfig(**same | change)
    (folder / "out" / run).mkdir(parents=True)
    (folder / "out" / run / "config.json").write_text(config_module.to_json(config))
    before = sorted(folder.rglob("*"))
    arguments = [*ARGUMENTS, "--losses", "bce", "mse", "--seeds", "2", *flags]
    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    assert done.returncode == 2
    different = list(change)[-1].replace("_", "-")
    assert f"out/{run} is another run (--{different} was " in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_without_scipy_one_line_names_what_to_install(monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.startswith(("scipy", "dae.analysis.")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("comparison", "comparison_report"):
        monkeypatch.delattr(analysis, name)  # so that the script imports it anew
    monkeypatch.setitem(sys.modules, "scipy", None)
    done = run_in_process("compare_losses.py", "--losses", "bce", cwd=tmp_path)
    assert done.returncode == 2
    assert "scipy" in done.stderr
    assert "pip install '.[compare]'" in done.stderr
    assert done.stderr.count("\n") == 1
