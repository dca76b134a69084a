import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import EXPERIMENTS, TINY

from dae.analysis import reproducibility
from dae.config import RunConfig
from dae.errors import RunError, UsageError
from dae.training import trainer
from dae.workdir.workdir import read_metrics


def assert_same_results(folder, other) -> None:
    assert reproducibility.first_difference(folder, other) is None
    for name in ("model.keras", "model.h5"):
        for weights, same in zip(
            *(keras.models.load_model(run / name).get_weights() for run in (folder, other)), strict=True
        ):
            np.testing.assert_array_equal(weights, same)


def test_a_run_leaves_every_file_of_the_contract(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        "checkpoints",
        "config.json",
        "curves.png",
        "denoised.png",
        "environment.json",
        "metrics.jsonl",
        "model.h5",
        "model.keras",
        "report.json",
        "tensorboard",
    }
    lines = read_metrics(tiny_run)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 10), (2, 20), (3, 30)]
    figures = ("loss", "bce", "bce_excess", "mse", "psnr", "ssim", "accuracy")
    for line in lines:
        others = {
            "epoch",
            "step",
            "learning_rate",
            "gradient_norm",
            "update_to_weight_ratio",
            *reproducibility.DURATIONS,
        }
        assert set(line) == others | {f"{name}_{figure}" for name in ("train", "validation") for figure in figures}
        assert line["seconds"] > 600 / line["images_per_second"]
    report = json.loads((tiny_run / "report.json").read_text())
    assert set(report) == {"epoch", "parameters"} | {f"test_{name}" for name in figures}
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert environment["versions"]["tensorflow"].startswith("2.")
    assert environment["cpu_cores"] >= 1


def test_the_losses_fall(tiny_run):
    lines = read_metrics(tiny_run)
    for name in ("train_loss", "validation_loss"):
        values = [line[name] for line in lines]
        assert values == sorted(values, reverse=True)
    assert lines[-1]["validation_loss"] < 0.5


@pytest.mark.parametrize(("loss", "warns"), [("mse", True), ("bce + mse", False)])
def test_a_network_that_turns_black_is_warned_of(loss, warns, tmp_path, capsys):
    """At the default learning rate mse alone does that to this network; so it does with Keras's `fit`."""
    config = RunConfig(train_examples=5000, validation_examples=64, batch_size=64, epochs=1, loss=loss)
    trainer.train(config, tmp_path / "run")
    assert ("returns nearly the same image" in capsys.readouterr().err) == warns


def test_the_same_configuration_gives_the_same_bits(tiny_run, tmp_path):
    trainer.train(TINY, tmp_path / "again")
    assert_same_results(tmp_path / "again", tiny_run)


def test_more_epochs_of_a_finished_run_equal_one_uninterrupted_run(tiny_run, tmp_path):
    trainer.train(replace(TINY, epochs=1), tmp_path / "run")
    trainer.train(replace(TINY, epochs=2), tmp_path / "run", resume=True)
    trainer.train(TINY, tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", tiny_run)


def test_a_finished_run_is_left_alone(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    report = trainer.train(TINY, tiny_run, resume=True)
    assert report == json.loads((tiny_run / "report.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_the_best_epoch_is_the_one_that_is_kept(tmp_path):
    # So high a learning rate that some epoch makes it worse again.
    config = replace(TINY, learning_rate=0.1, epochs=5)
    report = trainer.train(config, tmp_path / "run")
    losses = [line["validation_loss"] for line in read_metrics(tmp_path / "run")]
    assert losses != sorted(losses, reverse=True)
    assert report["epoch"] == 1 + int(np.argmin(losses))


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    report = trainer.train(replace(TINY, validation_examples=0, epochs=2), tmp_path / "run")
    assert report["epoch"] == 2
    assert not any(name.startswith("validation") for line in read_metrics(tmp_path / "run") for name in line)
    assert not (tmp_path / "run" / "tensorboard" / "validation").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    def poisoned(images, config, first_step=0):
        numbered = training_batches(images, config, first_step).enumerate(first_step + 1)
        return numbered.map(lambda step, batch: (tf.where(step == 14, float("nan"), batch[0]), batch[1]))

    training_batches = trainer.training_batches
    monkeypatch.setattr(trainer, "training_batches", poisoned)
    with pytest.raises(RunError, match="of step 14 is not finite"):
        trainer.train(TINY, tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()
    assert len(read_metrics(tmp_path / "run")) == 1
    monkeypatch.undo()
    trainer.train(TINY, tmp_path / "run", resume=True)
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_not_touched(tmp_path, resume):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else than a run"):
        trainer.train(TINY, tmp_path, resume=resume)
    with pytest.raises(UsageError, match="is no folder for a run"):
        trainer.train(TINY, tmp_path / "mine.txt", resume=resume)
    with pytest.raises(UsageError, match=r"--run-dir: .*mine.txt"):
        trainer.train(TINY, tmp_path / "mine.txt" / "run", resume=resume)
    with pytest.raises(UsageError, match="not a name for a run"):
        trainer.train(TINY, tmp_path / "lr[1]", resume=resume)
    with pytest.raises(UsageError, match="not a name for a run"):
        trainer.train(TINY, "", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_is_not_begun_twice(tiny_run):
    with pytest.raises(UsageError, match="has a run already; name another, or add --resume"):
        trainer.train(TINY, tiny_run)


@pytest.mark.parametrize("change", [{"loss": "bcee"}, {"model": "cnov"}, {"noise": "x"}, {"data": "/none.npz"}])
def test_mistakes_are_found_before_anything_is_written(change, tmp_path):
    with pytest.raises(UsageError):
        trainer.train(replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


LONG = RunConfig(train_examples=8000, validation_examples=64, batch_size=16, epochs=1)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run that nothing stopped, of 500 steps in its one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    trainer.train(LONG, folder)
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_a_resume_ends_the_same(number, status, long_run, tmp_path):
    flags = ["--config", str(long_run / "config.json"), "--run-dir", "stopped"]
    command = [sys.executable, str(EXPERIMENTS / "run.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "stopped").glob("tensorboard/train/*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)  # it is tracing the first step now
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "saved; go on with --resume --run-dir stopped" in said
    assert read_metrics(tmp_path / "stopped") == []
    trainer.train(LONG, tmp_path / "stopped", resume=True)
    assert_same_results(tmp_path / "stopped", long_run)
