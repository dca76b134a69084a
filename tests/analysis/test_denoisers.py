"""Scores of denoisers, noise sweeps, and the scripts evaluate.py and show_noise.py."""

import csv
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import run_in_process

from dae.analysis.denoisers import NO_DENOISING, Trial, bm3d_for, model_trial, save_sweep, score, sweep
from dae.analysis.report import TITLES
from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.evaluation import metrics
from dae.workdir.model_files import load_model

LEVELS = (0.0, 0.5, 1.0)
CONFIG = RunConfig(noise_level=0.5)


@pytest.fixture(scope="module")
def images(mnist) -> Images:
    return mnist.test[:100]


@pytest.fixture(scope="module")
def trial(images) -> Trial:
    """A network of one layer, which halves its input."""
    noisy = keras.Input((28, 28, 1))
    model = keras.Model(noisy, keras.layers.Conv2D(1, 1, kernel_initializer="ones", use_bias=False)(noisy))
    model.set_weights([model.get_weights()[0] / 2])
    return model_trial("half", model, CONFIG, images)


def test_a_score_has_the_metrics_of_the_denoised_images(trial, images):
    noisy, half = score(sweep([trial], ("gaussian",), (0.5,)))
    (batch,) = evaluation_batches(images, CONFIG, "test")
    clean = images.pixels / np.float32(255)
    assert half["mse"] == pytest.approx(((clean - batch.noisy.numpy() / 2) ** 2).mean(), rel=1e-5)
    assert noisy["psnr"] == pytest.approx(np.mean(metrics.psnr(batch.clean, batch.noisy)), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_bm3d_removes_noise_of_its_level(channels, images):
    pytest.importorskip("bm3d", reason="needs the extra `baselines`")
    clean = np.repeat(images.pixels[:2] / np.float32(255), channels, axis=-1)
    noisy = clean + 0.5 * np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    denoised = bm3d_for(0.5)(noisy)
    assert denoised.shape == clean.shape
    assert np.mean((denoised - clean) ** 2) < np.mean((noisy - clean) ** 2) / 3


def test_metrics_are_compiled_once_for_all_trials(trial, monkeypatch):
    traced, psnr = [], metrics.METRICS["psnr"]

    def counted(clean, denoised, inputs):
        traced.append(1)
        return psnr(clean, denoised)

    monkeypatch.setitem(metrics.METRICS, "psnr", counted)
    list(score(sweep([trial], ("gaussian", "poisson"), (0.1, 0.2))))
    assert len(traced) == 1


def test_an_invalid_level_is_rejected_before_anything_is_computed(trial):
    with pytest.raises(UsageError, match=r"--noise-level: .*masking.* 2.0"):
        sweep([trial], ("gaussian", "masking"), (0.5, 2.0))


def test_noises_of_the_same_name_get_different_labels(trial, tmp_path):
    for file, factor in (("a.py", "0.9"), ("b.py", "0.1")):
        (tmp_path / file).write_text(f"def darker(clean, level, seed):\n    return {factor} * clean\n")
    swept = sweep([trial], (f"{tmp_path}/a.py:darker", f"{tmp_path}/b.py:darker"), (0.5,))
    save_sweep(tmp_path / "sweep.png", swept[:2], score(swept[:2]))
    with open(tmp_path / "sweep.csv") as table:
        mse = {row["noise"]: float(row["mse"]) for row in csv.DictReader(table)}
    assert mse["darker-2"] == pytest.approx(81 * mse["darker"], rel=1e-4)


def test_a_sweep_is_saved_as_tables_a_csv_file_and_a_picture(trial, tmp_path):
    trials = sweep([trial], ("gaussian", "masking"), LEVELS)
    scores = list(score(trials))
    text = save_sweep(tmp_path / "sweep.png", trials, scores)
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line]
    assert head[:4] == ["denoiser", "noise", "level", "test images"]
    assert len(lines) == len(trials)
    for number, line in enumerate(lines):  # by noise and level, first without denoising
        index = number // 2 + 6 * (number % 2)
        trial, means = trials[index], scores[index]
        assert line[:4] == [trial.denoiser, trial.config.noise, f"{trial.config.noise_level:g}", "100"]
        assert line[head.index(TITLES["psnr"])] == f"{means['psnr']:.2f}"
    with open(tmp_path / "sweep.csv") as file:
        written = list(csv.DictReader(file))
    assert [float(row["ssim"]) for row in written] == [means["ssim"] for means in scores]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run(tiny_run, tmp_path, mnist) -> Path:
    """A finished run, which is tested on 100 digits."""
    run = shutil.copytree(tiny_run, tmp_path / "small")
    np.savez(tmp_path / "few.npz", x_train=mnist.train.pixels[:300], x_test=mnist.test.pixels[:100])
    config = json.loads((run / "config.json").read_text())
    config |= {"data": str(tmp_path / "few.npz"), "train_examples": None, "validation_examples": 9}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_evaluate_compares_runs_in_tables_a_plot_and_a_csv_file(run, images, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    arguments = ("--noise-levels", 0.1, 0.5, "--noises", "gaussian", "salt_pepper")
    done = run_in_process("evaluate.py", run, "other", *arguments, cwd=tmp_path)
    assert done.stderr == ""
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[:3] for row in rows[2:5]] == [[name, "gaussian", "0.1"] for name in (NO_DENOISING, "small", "other")]
    (expected,) = score([model_trial("small", load_model(run), CONFIG, images)])
    with open(tmp_path / "sweep.csv") as file:
        written = {(row["denoiser"], row["noise"], row["level"]): row for row in csv.DictReader(file)}
    assert len(written) == 3 * 2 * 2
    assert float(written["small", "gaussian", "0.5"]["psnr"]) == pytest.approx(expected["psnr"], rel=1e-6)
    assert (tmp_path / "sweep.png").exists()


def test_runs_with_other_test_images_are_not_compared(run, tiny_run, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = run_in_process("evaluate.py", run, tiny_run, "--noise-levels", 0.1, cwd=tmp_path, status=2)
    assert done.stderr.count("\n") == 1
    assert f"{tiny_run}: has other test images than {run}" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_show_noise_plots_all_noises(tmp_path):
    done = run_in_process("show_noise.py", "--noise-levels", 0, 0.5, cwd=tmp_path)
    assert done.stderr == ""
    assert tf.io.decode_png((tmp_path / "noise.png").read_bytes()).shape[0] > 600
