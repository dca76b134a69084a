import csv
import itertools
import json
import os
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

from dae import analysis
from dae.analysis import loss_comparison
from dae.analysis.loss_comparison import Comparison, conclusion
from dae.errors import Interrupted
from dae.evaluation.metrics import METRICS
from dae.reporting.logger import Logger
from dae.workdir.workdir import append_metrics, read_metrics


def comparison_of(**psnr: list[float]) -> Comparison:
    """Return a comparison of losses with these PSNRs, one per seed, and their negatives as MSEs."""
    mse = {loss: [-value for value in values] for loss, values in psnr.items()}
    metrics: dict[str, dict[str, list[float]]] = {"psnr": psnr, "mse": mse}
    seeds = list(range(len(next(iter(psnr.values())))))
    return Comparison(list(psnr), seeds, {loss: [1 for _ in seeds] for loss in psnr}, {"validation": metrics})


def sentence(text: str, loss: str) -> str:
    """Return the only line of a conclusion that starts with `loss`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{loss} ")]
    return line


@pytest.mark.parametrize("metric", ["psnr", "mse"])  # more dB is better, more error is worse
def test_conclusion_claims_only_significant_differences(metric):
    comparison = comparison_of(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05], c=[10.1, 11.8, 11.2], d=[10.0, 12.0, 11.0])
    text = conclusion(comparison, metric)
    ranking = text.splitlines()[0]
    assert "validation" in ranking
    assert "3 seeds" in ranking
    assert [ranking.index(f"{loss} (") for loss in "bcad"] == sorted(ranking.index(f"{loss} (") for loss in "bcad")
    difference = comparison.differences("validation", metric)["b"]
    for value in (f"{difference.mean:+.3g}", f"[{difference.low:+.3g}, {difference.high:+.3g}]"):
        assert value in sentence(text, "b")
    assert f"p = {difference.p_corrected:.2g}" in sentence(text, "b")
    assert "b is better than a" in sentence(text, "b")
    assert "no significant difference" in sentence(text, "c")
    assert "identical" in sentence(text, "d")
    assert text.count("better") == 1
    assert "worse" not in text.replace("worst", "")


def test_conclusion_names_a_worse_loss():
    text = conclusion(comparison_of(b=[11.0, 13.1, 12.05], a=[10.0, 12.0, 11.0]), "psnr")
    assert "a is worse than b" in sentence(text, "a")


def test_conclusion_of_one_seed_claims_no_difference():
    text = conclusion(comparison_of(a=[10.0], b=[11.0]), "psnr")
    assert "--seeds 3" in text
    assert "better" not in text
    assert "b (11), a (10)" in text


def check_files(out: Path, names: list[str]) -> dict[str, list[float]]:
    """Check the files of a comparison over two seeds against the runs' reports; return the test PSNRs by loss."""
    everything = json.loads((out / "comparison.json").read_text())
    assert (everything["losses"], everything["seeds"]) == (names, [0, 1])
    for name, seed in itertools.product(names, (0, 1)):
        report = json.loads((out / name / f"seed-{seed}" / "report.json").read_text())
        line = read_metrics(out / name / f"seed-{seed}")[report["epoch"] - 1]
        for metric in METRICS:
            assert everything["metrics"]["test"][metric][name][seed] == report[f"test_{metric}"]
            assert everything["metrics"]["validation"][metric][name][seed] == line[f"validation_{metric}"]
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(METRICS) * len(names)
    tables = (out / "comparison.md").read_text()
    for row in rows:
        values = everything["metrics"][row["split"]][row["metric"]]
        mean = np.mean(values[row["loss"]])
        assert float(row["mean"]) == pytest.approx(mean)
        assert f" {mean:.4f} [" in tables
        if row["loss"] != names[0]:
            assert float(row["difference_mean"]) == pytest.approx(mean - np.mean(values[names[0]]))
    for words in everything["conclusion"].splitlines():
        assert words in tables
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    return everything["metrics"]["test"]["psnr"]


def test_save_writes_the_metrics_of_each_run_and_their_means(tiny_run, tmp_path):
    names = ["bce", "2xbce"]
    runs = {name: [tmp_path / name / f"seed-{seed}" for seed in (0, 1)] for name in names}
    for number, folder in enumerate(itertools.chain.from_iterable(runs.values())):
        # A run with other metrics, which kept its second epoch.
        folder.mkdir(parents=True)
        shutil.copy(tiny_run / "model.keras", folder)
        report = json.loads((tiny_run / "report.json").read_text())
        report |= {name: value + 0.001 * number**2 for name, value in report.items()} | {"epoch": 2}
        (folder / "report.json").write_text(json.dumps(report))
        for line in read_metrics(tiny_run):
            append_metrics(folder, line | {name: value + 0.01 * number**2 for name, value in line.items()})
    loss_comparison.save(loss_comparison.gather(runs, [0, 1]), "psnr", tmp_path, TINY)
    check_files(tmp_path, names)

    one_seed = loss_comparison.gather({name: folders[:1] for name, folders in runs.items()}, [0])
    loss_comparison.save(one_seed, "psnr", tmp_path, TINY)
    assert "--seeds 3" in (tmp_path / "comparison.md").read_text()
    assert "NaN" not in (tmp_path / "comparison.json").read_text()


ARGUMENTS = ["--data", "few.npz", "--validation-examples", "128", "--batch-size", "64", "--epochs", "1"]
ARGUMENTS += ["--output", "out"]


@pytest.fixture
def folder(tmp_path, mnist) -> Path:
    """A folder with a few digits."""
    np.savez(tmp_path / "few.npz", x_train=mnist.train[:384], x_test=mnist.test[:64])
    return tmp_path


@pytest.mark.slow
def test_a_comparison_leaves_finished_runs_alone_and_a_loss_is_identical_to_itself(folder):
    first, second = (folder / "out" / name / "seed-0" / "report.json" for name in ("bce", "bce-2"))
    done = run_in_process("compare_losses.py", *ARGUMENTS, "--losses", "bce", "--seeds", "1", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1/1" not in done.stdout  # a line per run, not per epoch
    finished = first.stat().st_mtime_ns
    done = run_in_process("compare_losses.py", *ARGUMENTS, "--losses", "bce", "bce", "--seeds", "1", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert first.stat().st_mtime_ns == finished
    assert first.read_text() == second.read_text()
    assert "identical" in sentence(done.stdout, "bce-2")


@pytest.mark.slow
def test_a_killed_comparison_resumes(folder):
    out, arguments = folder / "out", [*ARGUMENTS, "--losses", "bce", "bce", "2*bce", "--seeds", "2"]
    command = [sys.executable, str(EXPERIMENTS / "compare_losses.py"), *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while not (out / "bce-2" / "seed-0" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # in the second of six runs, seconds before the last ends
    process.wait()
    assert not (out / "comparison.json").exists()
    finished = (out / "bce" / "seed-0" / "report.json").stat().st_mtime_ns

    done = run_in_process("compare_losses.py", *arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "bce" / "seed-0" / "report.json").stat().st_mtime_ns == finished
    psnr = check_files(out, ["bce", "bce-2", "2xbce"])
    assert psnr["bce"] == psnr["bce-2"]
    assert psnr["bce"][0] != psnr["bce"][1]
    assert "identical" in sentence(done.stdout, "bce-2")
    # Adam divides by the scale of the gradient, up to its epsilon.
    assert psnr["2xbce"] == pytest.approx(psnr["bce"], abs=0.02)
    assert psnr["2xbce"] != psnr["bce"]


def test_an_interrupted_comparison_says_how_to_continue(tmp_path, monkeypatch):
    def progress_and_signal(self: Logger, epoch: int, images: int, loss: Any) -> None:
        progress(self, epoch, images, loss)
        os.kill(os.getpid(), signal.SIGINT)

    progress = Logger.progress
    monkeypatch.setattr(Logger, "progress", progress_and_signal)
    with pytest.raises(Interrupted, match=r"bce/seed-0.*repeat the command"):
        loss_comparison.train_all(["bce"], replace(TINY, train_examples=100, epochs=1), [0], tmp_path)
    assert list((tmp_path / "bce" / "seed-0" / "checkpoints" / "latest").glob("ckpt-1.index"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "bce", "mes"], ["--loss: ", "'mes'", "did you mean 'mse'"]),
        (["--losses", "bce", "mse +* bce"], ["--loss: ", "'mse +* bce'", "'* bce'"]),
        (["--losses", "bce", "--metric", "psnrr"], ["--metric: ", "'psnrr'", "did you mean 'psnr'"]),
        (["--losses", "bce", "--seeds", "0"], ["--seeds: ", "got 0"]),
        (["--losses", "bce", "--validation-examples", "0"], ["--validation-examples: "]),
        (["--losses", "--loss", "mse"], ["--losses: "]),
    ],
)
def test_a_mistake_is_found_before_the_first_run(arguments, words, tmp_path):
    done = run_in_process("compare_losses.py", *arguments, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_without_scipy_one_line_names_what_to_install(monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.startswith(("scipy", "dae.analysis.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(analysis, "loss_comparison")  # so that the script imports it anew
    monkeypatch.setitem(sys.modules, "scipy", None)
    done = run_in_process("compare_losses.py", "--losses", "bce", cwd=tmp_path)
    assert done.returncode == 2
    assert "scipy" in done.stderr
    assert "pip install '.[compare]'" in done.stderr
    assert done.stderr.count("\n") == 1
