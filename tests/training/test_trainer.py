"""Whole runs: their files, what they warn of, early stopping, and failures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, file_size_limit
from hypothesis import given
from hypothesis import strategies as st
from runs import config_of

from dae.analysis.reproducibility import DURATIONS, first_difference
from dae.config import RunConfig
from dae.data.pipeline import equal_batches, steps_per_epoch
from dae.errors import RunError, UsageError
from dae.models import networks
from dae.reporting.logger import warn_if_collapsed
from dae.training import trainer
from dae.training.calls import VALUES_PER_LOOP, loop_calls
from dae.training.checkpoints import saved_in
from dae.workdir.workdir import read_metrics


def test_run_writes_every_documented_file_and_its_losses_fall(tiny_run):
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
        "resolved.json",
        "tensorboard",
    }
    lines = read_metrics(tiny_run)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 10), (2, 20), (3, 30)]
    metrics = ("loss", "bce", "bce_excess", "mse", "psnr", "ssim", "accuracy")
    others = {"epoch", "step", "learning_rate", "gradient_norm", "update_to_weight_ratio", *DURATIONS}
    for line in lines:
        assert set(line) == others | {f"{name}_{metric}" for name in ("train", "validation") for metric in metrics}
        assert line["seconds"] > 600 / line["images_per_second"]
    report = json.loads((tiny_run / "report.json").read_text())
    facts = {"epochs", "epoch", "noise", "num_test_images", "parameters", "weights_sha256", "test_psnr_of_mean_mse"}
    assert report["noise"] == {"model": "gaussian", "level": 0.5, "clipped": True}
    assert report["num_test_images"] == 10_000
    assert set(report) == facts | {f"test_{metric}" for metric in metrics}
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert environment["versions"]["tensorflow"] == tf.__version__
    assert environment["cpu_cores"] >= 1
    for name in ("train_loss", "validation_loss"):
        losses = [line[name] for line in lines]
        assert losses == sorted(losses, reverse=True)
    assert lines[-1]["validation_loss"] < 0.5


def test_finished_run_is_left_as_it_is(tiny_run, tmp_path, capsys):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report = trainer.train(TINY, run, resume=True)
    assert report == json.loads((run / "report.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# Calls of the train loop


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 40) | st.none(), st.integers(0, 60), st.integers(1, 200))
def test_calls_take_the_rest_of_an_epoch_in_pieces_of_one_size_up_to_each_checkpoint(
    examples, batch_size, checkpoint_every, step, side
):
    steps = steps_per_epoch(examples, batch_size)
    every = checkpoint_every or steps
    task: Any = SimpleNamespace(
        config=RunConfig(batch_size=batch_size),
        examples=examples,
        steps_per_epoch=steps,
        checkpoint_every=every,
        model=SimpleNamespace(input_shape=(None, side, side, 1)),
    )
    found = list(loop_calls(task, step))
    ends = np.cumsum([step, *(call.num_steps for call in found)])
    assert ends[-1] % steps == 0
    assert ends[-1] - ends[0] <= steps
    assert [call.is_last for call in found] == [False] * (len(found) - 1) + [True]
    for start, end, call in zip(ends, ends[1:], found, strict=False):
        assert end > start
        assert {equal_batches(examples, batch_size, int(taken))[1] for taken in range(start, end)} == {call.batch_size}
        assert (end - 1) // every == start // every  # no checkpoint is due before the end of the call
        assert call.num_steps == 1 or call.num_steps * batch_size * side**2 <= VALUES_PER_LOOP


def test_a_call_takes_20_batches_of_mnist():
    model = SimpleNamespace(input_shape=(None, 28, 28, 1))
    task: Any = SimpleNamespace(
        config=RunConfig(), examples=128 * 30 + 1, steps_per_epoch=31, checkpoint_every=31, model=model
    )
    assert list(loop_calls(task, 31)) == [(20, 128, False), (10, 128, False), (1, 1, True)]


# Warnings


def test_a_collapsed_network_is_warned_of_but_not_an_initial_one(mnist, capsys):
    model = networks.build(TINY, (28, 28, 1))
    noisy = tf.constant(mnist.train.pixels[:30] / np.float32(255))
    for variable in model.trainable_variables:
        variable.assign(3 * variable)  # at first all outputs are nearly equal
    warn_if_collapsed(model, noisy)
    assert capsys.readouterr().err == ""
    model.layers[-1].kernel.assign(tf.zeros_like(model.layers[-1].kernel))
    warn_if_collapsed(model, noisy)
    warning = capsys.readouterr().err
    for words in ("the same image", "--learning-rate", "--bce-steps"):
        assert words in warning


@pytest.mark.slow
def test_run_whose_network_turns_black_is_warned_of(tmp_path, capsys):
    """From grey outputs, at the default learning rate, mse alone does that; so it does in Keras's `fit`."""
    small = RunConfig(train_examples=5000, validation_examples=64, batch_size=64, epochs=1)
    trainer.train(replace(small, loss="mse", bce_steps=0, initial_brightness=0.5), tmp_path / "run")
    assert "the same image" in capsys.readouterr().err


# Early stopping and the best epoch: at so high a learning rate, some epochs are worse than those before them.

PATIENT: dict[str, Any] = {
    "train_examples": 16,
    "epochs": 40,
    "learning_rate": 0.3,
    "patience": 1,
    "checkpoint_every": None,
}


@pytest.mark.slow
def test_run_stops_after_the_documented_number_of_epochs_keeps_the_best_and_is_not_continued(files, tmp_path, capsys):
    """Killed before it wrote its report, with nothing left but to stop, it is resumed to the same bits."""
    config, stopped = config_of(files, **PATIENT), tmp_path / "stopped"
    report = trainer.train(config, stopped, quiet=True)
    lines = read_metrics(stopped)
    losses = [line["validation_loss"] for line in lines]
    ages = [epoch - 1 - int(np.argmin(losses[:epoch])) for epoch in range(1, len(losses) + 1)]
    assert ages.index(1) == len(losses) - 1 < 39
    assert report["epoch"] == 1 + int(np.argmin(losses)) == len(losses) - 1

    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / "report.json").unlink()
    trainer.train(config, run, resume=True)
    message = f"stopped after epoch {len(lines)}, 1 epochs after the best one"
    assert message in capsys.readouterr().out
    assert first_difference(run, stopped) is None

    trainer.train(replace(config, epochs=50), stopped, quiet=True, resume=True)
    assert read_metrics(stopped) == lines


@pytest.mark.slow
def test_a_run_whose_loss_depends_on_progress_cannot_grow(finished_run, files, tmp_path):
    config = config_of(files, "sum", schedule="constant", warmup_ratio=0.0)
    copy = Path(shutil.copytree(finished_run("sum"), tmp_path / "run"))
    saved = json.loads((copy / "config.json").read_text()) | {"schedule": "constant", "warmup_ratio": 0.0}
    (copy / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"^--epochs: cannot grow, .*`progress`"):
        trainer.train(replace(config, epochs=3), copy, resume=True, quiet=True)
    assert (copy / "report.json").exists()


# Failures


def test_loss_that_is_not_finite_stops_the_run_and_keeps_earlier_checkpoints(files, tmp_path, monkeypatch, capsys):
    """In a run with a BCE warm-up, which it announces, and warns of because it is too long."""

    def poisoned(images, config, first_step):
        numbered = training_batches(images, config, first_step).enumerate(first_step + 1)
        return numbered.map(lambda step, batch: batch._replace(noisy=tf.where(step == 10, np.nan, batch.noisy)))

    run, training_batches = tmp_path / "run", trainer.training_batches
    monkeypatch.setattr(trainer, "training_batches", poisoned)
    with pytest.raises(RunError, match=r"step 10 is not finite.*--learning-rate"):
        trainer.train(config_of(files, loss="mae", bce_steps=14), run)
    assert not (run / "report.json").exists()
    assert [line["epoch"] for line in read_metrics(run)] == [1]
    assert saved_in(run / "checkpoints" / "latest")[-1].name == "ckpt-8"
    printed = capsys.readouterr()
    assert "loss: BCE warm-up, then mae from step 14" in printed.out
    assert "warning: --bce-steps: BCE is part of the loss in 14 of 14 steps" in printed.err


@pytest.mark.slow
def test_full_disk_ends_the_run_with_an_error_and_it_can_be_resumed(tiny_run, tmp_path):
    with file_size_limit(60_000), pytest.raises(RunError, match="resume=True"):  # checkpoints are larger
        trainer.train(TINY, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "report.json").exists()
    assert saved_in(tmp_path / "run" / "checkpoints" / "latest") == []
    trainer.train(TINY, tmp_path / "run", resume=True, quiet=True)
    assert first_difference(tmp_path / "run", tiny_run) is None
