import csv
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, run_script

from dae import datasets, denoiser, metrics, sweep
from dae.errors import UsageError
from dae.sweep import Contender, Tested

LEVELS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def results(tiny_run) -> list[Tested]:
    images = datasets.load(TINY).test[:500]
    contender = Contender("tiny", denoiser.load_model(tiny_run), TINY, images)
    return list(sweep.sweep([contender], ("gaussian", "masking"), LEVELS))


def test_every_denoiser_is_tested_on_every_noise_at_every_level(results):
    assert [(r.denoiser, r.noise, r.level) for r in results] == [
        (name, noise, level) for name in ("none", "tiny") for noise in ("gaussian", "masking") for level in LEVELS
    ]


def test_the_figures_are_those_that_the_formulas_give(results, mnist):
    figures = {(r.denoiser, r.noise, r.level): r.figures for r in results}
    for noise in ("gaussian", "masking"):
        assert figures["none", noise, 0.0]["mse"] == 0
        worse = [figures["none", noise, level]["psnr"] for level in LEVELS]
        assert worse == sorted(worse, reverse=True)
    clean = mnist.test[:500] / 255
    # All is masked.
    assert figures["none", "masking", 1.0]["mse"] == pytest.approx((clean**2).mean(), rel=1e-5)


def test_a_model_is_compiled_once_for_all_levels(tiny_run, monkeypatch):
    traced, psnr = [], metrics.METRICS["psnr"]

    def counted(clean, denoised):
        traced.append(1)
        return psnr(clean, denoised)

    monkeypatch.setitem(metrics.METRICS, "psnr", counted)
    contender = Contender("tiny", denoiser.load_model(tiny_run), TINY, datasets.load(TINY).test[:500])
    list(sweep.sweep([contender], ("gaussian", "poisson"), (0.1, 0.2, 0.3)))
    assert len(traced) == 2  # the model's, and the baseline's


def test_a_level_that_cannot_be_is_refused_before_anything_is_computed(tiny_run):
    contender = Contender("tiny", denoiser.load_model(tiny_run), TINY, datasets.load(TINY).test[:500])
    with pytest.raises(UsageError, match=r"--noise-level: 2.0 is not from 0 to 1, as a level of masking"):
        next(sweep.sweep([contender], ("gaussian", "masking"), (0.5, 2.0)))


def test_evaluate_compares_runs_in_tables_a_plot_and_a_csv_file(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "other")
    arguments = ("--noise-levels", 0.1, 0.5, "--noises", "gaussian", "salt_pepper")
    done = run_script("evaluate.py", tiny_run, "other", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| PSNR, dB | level | none | tiny | other |" in done.stdout
    report = json.loads((tiny_run / "report.json").read_text())
    rows = {
        (row["denoiser"], row["noise"], row["level"]): row for row in csv.DictReader((tmp_path / "sweep.csv").open())
    }
    assert len(rows) == 3 * 2 * 2
    assert float(rows["tiny", "gaussian", "0.5"]["psnr"]) == pytest.approx(report["test_psnr"], rel=1e-6)
    assert rows["tiny", "gaussian", "0.5"]["psnr"] == rows["other", "gaussian", "0.5"]["psnr"]
    picture = tf.io.decode_png((tmp_path / "sweep.png").read_bytes())
    assert picture.shape[0] > 400
    # A matrix where there is one level, here the runs' own.
    done = run_script("evaluate.py", tiny_run, "--noises", "gaussian", "uniform", "--figure", "m.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"| gaussian | 0.5 | 9.40 | {report['test_psnr']:.2f} |" in done.stdout
    assert (tmp_path / "m.png").exists()


def test_the_trained_range_is_shaded_and_a_trained_level_marked(tmp_path, tiny_run, monkeypatch):
    shaded, marked = [], []
    monkeypatch.setattr(sweep.Axes, "axvspan", lambda self, low, high, **_: shaded.append((low, high)))
    monkeypatch.setattr(sweep.Axes, "axvline", lambda self, level, **_: marked.append(level))
    images, model = np.zeros((1, 28, 28, 1), np.uint8), denoiser.load_model(tiny_run)
    blind = sweep.dataclasses.replace(TINY, noise_level=(0.1, 0.8))
    contenders = [Contender("tiny", model, TINY, images), Contender("blind", model, blind, images)]
    figures = dict.fromkeys(sweep.TITLES, 1.0)
    shown = [Tested(name, "gaussian", level, figures) for name in ("tiny", "blind") for level in LEVELS]
    sweep.draw(tmp_path / "sweep.png", shown, contenders)
    assert set(shaded) == {(0.1, 0.8)}
    assert set(marked) == {0.5}


def test_the_picture_of_all_noises_is_drawn(tmp_path):
    done = run_script("show_noise.py", "--noise-levels", 0, 0.5, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert tf.io.decode_png((tmp_path / "noise.png").read_bytes()).shape[0] > 600
