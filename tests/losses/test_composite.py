"""Tests of sums of losses, their names and curves, and of losses that are Python functions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, check_curves, events, run_in_process

import dae
from dae import plugins
from dae.analysis import reproducibility
from dae.errors import UsageError
from dae.losses import composite
from dae.losses.losses import LOSSES
from dae.training import trainer
from dae.workdir.workdir import read_metrics

SUM = replace(TINY, epochs=2, loss="bce + 0.1*ssim", bce_steps=10, checkpoint_every=4)


@pytest.fixture(scope="module")
def sum_run(tmp_path_factory) -> Path:
    """A finished run of SUM."""
    folder = tmp_path_factory.mktemp("runs") / "sum"
    trainer.train(SUM, folder)
    return folder


def test_sum_and_its_terms_have_their_values(mnist):
    clean, denoised = (
        tf.constant(images / np.float32(255)) for images in (mnist.test.pixels[:4], mnist.test.pixels[4:8])
    )
    values = composite.build("2*mae + 0.1*ssim + bce")(clean, denoised)
    assert list(values) == ["loss", "loss_mae", "loss_ssim", "loss_bce"]
    mae, ssim, bce = (LOSSES[name](clean, denoised).numpy() for name in ("mae", "ssim", "bce"))
    expected = {"loss": 2 * mae + 0.1 * ssim + bce, "loss_mae": mae, "loss_ssim": ssim, "loss_bce": bce}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)


def test_single_term_has_only_the_weighted_total(mnist):
    clean, denoised = (
        tf.constant(images / np.float32(255)) for images in (mnist.test.pixels[:4], mnist.test.pixels[4:8])
    )
    values = composite.build("2*mae")(clean, denoised)
    assert list(values) == ["loss"]
    np.testing.assert_allclose(values["loss"], 2 * LOSSES["mae"](clean, denoised).numpy(), rtol=1e-6)


def test_terms_of_the_same_name_are_numbered(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("def bce(clean, denoised): ...\ndef total(clean, denoised): ...\n")
    names = composite.build(f"bce + {tmp_path}/a.py:bce + {tmp_path}/b.py:bce + {tmp_path}/b.py:total").names
    assert names == ("loss", "loss_bce", "loss_bce_2", "loss_bce_3", "loss_total_2")


def test_unknown_loss_is_refused_with_the_most_similar_name_and_all_names():
    with pytest.raises(UsageError, match=f"^--loss: .*'sism'.*'ssim'.*{', '.join(LOSSES)}") as caught:
        composite.build("bce + 0.1*sism")
    assert "\n" not in str(caught.value)


def test_metrics_report_and_tensorboard_have_each_term_beside_the_total(sum_run):
    for line in read_metrics(sum_run):
        for part in ("train", "validation"):
            terms = line[f"{part}_loss_bce"] + 0.1 * line[f"{part}_loss_ssim"]
            assert line[f"{part}_loss"] == pytest.approx(terms, rel=1e-5)
        assert line["validation_loss_bce"] == pytest.approx(line["validation_bce"], rel=1e-6)
        assert line["validation_loss_ssim"] == pytest.approx(1 - line["validation_ssim"], rel=1e-5)
    report = json.loads((sum_run / "report.json").read_text())
    assert report["test_loss"] == pytest.approx(report["test_loss_bce"] + 0.1 * report["test_loss_ssim"], rel=1e-5)
    check_curves(sum_run)
    for name in ("train", "validation"):
        assert {"loss/total", "loss/bce", "loss/ssim"} <= set(events(sum_run / "tensorboard" / name).Tags()["tensors"])


@pytest.mark.slow
def test_resume_within_an_epoch_continues_the_means_of_all_terms(sum_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sum_run, folder)
    (folder / "report.json").unlink()
    for path in (folder / "checkpoints" / "latest").glob("ckpt-20.*"):
        path.unlink()  # as if killed after step 16, in the middle of epoch 2
    done = run_in_process("run.py", "--loss", "1*bce+.1 * ssim", "--resume", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "after step 16" in done.stdout
    assert reproducibility.first_difference(folder, sum_run) is None


def my_loss(clean, denoised):
    return LOSSES["bce"](clean, denoised)


@pytest.fixture(scope="module")
def function_run(tmp_path_factory) -> Path:
    """A finished run of one epoch with a Python function as its loss."""
    folder = tmp_path_factory.mktemp("runs") / "function"
    dae.train(replace(TINY, epochs=1), folder, loss=my_loss)
    return folder


def test_python_function_is_minimized_and_recorded(function_run):
    report = json.loads((function_run / "report.json").read_text())
    assert report["test_loss"] == pytest.approx(report["test_bce"], rel=1e-6)
    assert json.loads((function_run / "config.json").read_text())["loss"].startswith("python:my_loss@")
    assert (function_run / "code" / "my_loss.py").read_text().startswith("def my_loss(clean, denoised):\n")


def test_resume_without_the_python_function_or_with_an_edited_one_is_refused(function_run, monkeypatch):
    def edited(clean, denoised):
        return 2 * my_loss(clean, denoised)

    edited.__name__ = "my_loss"
    with pytest.raises(UsageError, match=r"another run .*--loss"):
        dae.train(replace(TINY, epochs=2), function_run, loss=edited, resume=True)
    monkeypatch.setattr(plugins, "_REGISTERED", {})  # as in another process
    done = run_in_process("run.py", "--run-dir", function_run, "--resume", "--epochs", 2)
    assert done.returncode == 2
    assert "--loss: my_loss " in done.stderr
    assert "dae.train(config, loss=my_loss)" in done.stderr


def test_resume_of_a_finished_run_with_the_python_function_returns_its_report(function_run):
    report = json.loads((function_run / "report.json").read_text())
    assert dae.train(replace(TINY, epochs=1), function_run, loss=my_loss, resume=True) == report


@pytest.mark.slow
def test_resume_with_the_python_function_trains_as_with_the_built_in_loss(function_run, tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(function_run, folder)
    dae.train(TINY, folder, loss=my_loss, resume=True)
    for line, same in zip(read_metrics(folder), read_metrics(tiny_run), strict=True):
        assert line["validation_mse"] == pytest.approx(same["validation_mse"], rel=1e-5)


def test_run_with_a_python_function_can_be_evaluated(function_run):
    done = run_in_process("evaluate.py", function_run)
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
