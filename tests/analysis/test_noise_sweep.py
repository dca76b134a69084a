import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import run_here

from dae import config as configs
from dae.analysis import noise_sweep
from dae.analysis.noise_sweep import Contender, Result
from dae.config import RunConfig
from dae.data import datasets
from dae.errors import UsageError
from dae.evaluation import metrics
from dae.training import trainer
from dae.workdir import model_files

LEVELS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, mnist) -> Path:
    """A finished run on 300 digits, tested on 100."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    data = folder.with_suffix(".npz")
    np.savez(data, x_train=mnist.train[:300], x_test=mnist.test[:100])
    trainer.train(RunConfig(data=str(data), batch_size=64, epochs=1), folder)
    return folder


@pytest.fixture(scope="module")
def contender(run) -> Contender:
    config = configs.read(run / "config.json")
    return Contender("small", model_files.load_model(run), config, datasets.load(config).test)


@pytest.fixture(scope="module")
def results(contender) -> list[Result]:
    return list(noise_sweep.sweep([contender], ("gaussian", "masking"), LEVELS))


def test_every_denoiser_is_tested_on_every_noise_at_every_level(results):
    assert [(r.denoiser, r.noise, r.level) for r in results] == [
        (name, noise, level) for name in ("none", "small") for noise in ("gaussian", "masking") for level in LEVELS
    ]


def test_the_figures_are_those_that_the_formulas_give(results, mnist):
    figures = {(r.denoiser, r.noise, r.level): r.figures for r in results}
    for noise in ("gaussian", "masking"):
        assert figures["none", noise, 0.0]["mse"] == 0
        worse = [figures["none", noise, level]["psnr"] for level in LEVELS]
        assert worse == sorted(worse, reverse=True)
    clean = mnist.test[:100] / 255
    # All is masked.
    assert figures["none", "masking", 1.0]["mse"] == pytest.approx((clean**2).mean(), rel=1e-5)


def test_a_model_is_compiled_once_for_all_levels(contender, monkeypatch):
    traced, psnr = [], metrics.METRICS["psnr"]

    def counted(clean, denoised):
        traced.append(1)
        return psnr(clean, denoised)

    monkeypatch.setitem(metrics.METRICS, "psnr", counted)
    list(noise_sweep.sweep([contender], ("gaussian", "poisson"), (0.1, 0.2, 0.3)))
    assert len(traced) == 2 * contender.config.micro_batches  # the model's, and the baseline's


def test_a_level_that_cannot_be_is_refused_before_anything_is_computed(contender):
    with pytest.raises(UsageError, match=r"--noise-level: 2.0 is not from 0 to 1, as a level of masking"):
        next(noise_sweep.sweep([contender], ("gaussian", "masking"), (0.5, 2.0)))


def test_evaluate_compares_runs_in_tables_a_plot_and_a_csv_file(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    arguments = ("--noise-levels", 0.1, 0.5, "--noises", "gaussian", "salt_pepper")
    done = run_here("evaluate.py", run, "other", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| PSNR, dB | level | none | small | other |" in done.stdout
    report = json.loads((run / "report.json").read_text())
    with open(tmp_path / "sweep.csv") as file:
        rows = {(row["denoiser"], row["noise"], row["level"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * 2 * 2
    assert float(rows["small", "gaussian", "0.5"]["psnr"]) == pytest.approx(report["test_psnr"], rel=1e-6)
    assert rows["small", "gaussian", "0.5"]["psnr"] == rows["other", "gaussian", "0.5"]["psnr"]
    picture = tf.io.decode_png((tmp_path / "sweep.png").read_bytes())
    assert picture.shape[0] > 400


def test_evaluate_without_a_model_asks_for_one(tmp_path):
    done = run_here("evaluate.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "name one or more models" in done.stderr


def test_noises_of_one_name_are_told_apart(contender, tmp_path):
    for file, factor in (("a.py", "0.9"), ("b.py", "0.1")):
        (tmp_path / file).write_text(f"def darker(clean, level, seed):\n    return {factor} * clean\n")
    named = noise_sweep.sweep([contender], (f"{tmp_path}/a.py:darker", f"{tmp_path}/b.py:darker"), (0.5,))
    mse = {result.noise: result.figures["mse"] for result in named if result.denoiser == "none"}
    assert mse["darker-2"] == pytest.approx(81 * mse["darker"], rel=1e-4)


def test_at_one_level_the_picture_is_a_matrix_of_noises_and_denoisers(results, contender, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        noise_sweep.Axes, "text", lambda self, column, row, text, **_: written.append((column, row, text))
    )
    one_level = [result for result in results if result.level == 0.5]
    noise_sweep.draw(tmp_path / "sweep.png", one_level, [contender])
    assert len(written) == len(noise_sweep.TITLES) * 4
    masked = next(r for r in one_level if (r.denoiser, r.noise) == ("small", "masking"))
    assert (1, 1, f"{masked.figures['psnr']:.3g}") in written


def test_the_trained_range_is_shaded_and_a_trained_level_marked(tmp_path, contender, monkeypatch):
    shaded, marked = [], []
    monkeypatch.setattr(noise_sweep.Axes, "axvspan", lambda self, low, high, **_: shaded.append((low, high)))
    monkeypatch.setattr(noise_sweep.Axes, "axvline", lambda self, level, **_: marked.append(level))
    blind = replace(contender, name="blind", config=replace(contender.config, noise_level=(0.1, 0.8)))
    contenders = [contender, blind]
    figures = dict.fromkeys(noise_sweep.TITLES, 1.0)
    shown = [Result(name, "gaussian", level, figures) for name in ("small", "blind") for level in LEVELS]
    noise_sweep.draw(tmp_path / "sweep.png", shown, contenders)
    assert set(shaded) == {(0.1, 0.8)}
    assert set(marked) == {0.5}


def test_the_picture_of_all_noises_is_drawn(tmp_path):
    done = run_here("show_noise.py", "--noise-levels", 0, 0.5, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert tf.io.decode_png((tmp_path / "noise.png").read_bytes()).shape[0] > 600
