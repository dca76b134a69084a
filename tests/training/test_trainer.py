"""Whole runs: their files, exactness, interruption, resuming, and failures."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, TINY, new_state

from dae import config as config_module
from dae.analysis.reproducibility import DURATIONS, first_difference
from dae.config import RunConfig
from dae.errors import Interrupted, RunError, UsageError
from dae.reporting.logger import Logger
from dae.training import trainer
from dae.training.checkpoints import Checkpoints, saved_in
from dae.training.signals import deferred_signals
from dae.training.task import Task, prepare
from dae.workdir.workdir import read_metrics


def assert_same_results(run: Path, other: Path) -> None:
    """Assert that the results are identical, also the weights in the model files, which hold dates as well."""
    assert first_difference(run, other) is None
    for name in ("model.keras", "model.h5"):
        weights, other_weights = (keras.models.load_model(folder / name).get_weights() for folder in (run, other))
        for weight, other_weight in zip(weights, other_weights, strict=True):
            np.testing.assert_array_equal(weight, other_weight, strict=True)


def test_run_writes_every_documented_file(tiny_run):
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
    metrics = ("loss", "bce", "bce_excess", "mse", "psnr", "ssim", "accuracy")
    others = {"epoch", "step", "learning_rate", "gradient_norm", "update_to_weight_ratio", *DURATIONS}
    for line in lines:
        assert set(line) == others | {f"{name}_{metric}" for name in ("train", "validation") for metric in metrics}
        assert line["seconds"] > 600 / line["images_per_second"]
    report = json.loads((tiny_run / "report.json").read_text())
    assert set(report) == {"epoch", "parameters"} | {f"test_{metric}" for metric in metrics}
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert environment["versions"]["tensorflow"] == tf.__version__
    assert environment["cpu_cores"] >= 1


def test_losses_fall(tiny_run):
    lines = read_metrics(tiny_run)
    for name in ("train_loss", "validation_loss"):
        losses = [line[name] for line in lines]
        assert losses == sorted(losses, reverse=True)
    assert lines[-1]["validation_loss"] < 0.5


@pytest.mark.slow
def test_same_configuration_gives_the_same_bits(tiny_run, tmp_path):
    report = trainer.train(TINY, tmp_path / "again", quiet=True)
    assert_same_results(tmp_path / "again", tiny_run)
    assert report == json.loads((tiny_run / "report.json").read_text())


@pytest.mark.slow
def test_more_epochs_of_a_finished_run_equal_one_uninterrupted_run(tiny_run, tmp_path):
    trainer.train(replace(TINY, epochs=1), tmp_path / "run", quiet=True)
    trainer.train(TINY, tmp_path / "run", resume=True, quiet=True)
    assert_same_results(tmp_path / "run", tiny_run)


def test_finished_run_is_left_as_it_is(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    report = trainer.train(TINY, tiny_run, resume=True)
    assert report == json.loads((tiny_run / "report.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


@pytest.mark.slow
def test_best_epoch_is_kept(tmp_path):
    # With so high a learning rate some epochs are worse than those before them.
    config = replace(TINY, learning_rate=0.3, initial_brightness=0.5, epochs=8)
    report = trainer.train(config, tmp_path / "run", quiet=True)
    losses = [line["validation_loss"] for line in read_metrics(tmp_path / "run")]
    assert losses != sorted(losses, reverse=True)
    assert report["epoch"] == 1 + int(np.argmin(losses))


@pytest.mark.slow
def test_quiet_run_without_validation_keeps_the_last_epoch_and_prints_nothing(tmp_path, capsys):
    lines: list[dict[str, float]] = []
    config = replace(TINY, validation_examples=0, epochs=2)
    report = trainer.train(config, tmp_path / "run", quiet=True, on_epoch_end=lines.append)
    assert capsys.readouterr() == ("", "")
    assert lines == read_metrics(tmp_path / "run")
    assert report["epoch"] == 2
    assert not any(name.startswith("validation") for line in read_metrics(tmp_path / "run") for name in line)
    assert not (tmp_path / "run" / "tensorboard" / "validation").exists()
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


@pytest.fixture(scope="module")
def task() -> Task:
    """A task whose model returns the same grey image for all inputs."""
    task = prepare(TINY)
    task.model.layers[-1].kernel.assign(tf.zeros_like(task.model.layers[-1].kernel))
    return task


def test_collapsed_network_is_warned_of(task, capsys):
    trainer.warn_if_collapsed(task)
    warning = capsys.readouterr().err
    assert "the same image" in warning
    assert "--learning-rate" in warning
    assert "--bce-steps" in warning


def test_initial_network_is_not_taken_for_collapsed(capsys):
    task = prepare(TINY)
    for variable in task.model.trainable_variables:
        variable.assign(3 * variable)  # at first all outputs are nearly equal
    trainer.warn_if_collapsed(task)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "warns"), [("mse", True), ("bce + mse", False)])
def test_run_whose_network_turns_black_is_warned_of(loss, warns, tmp_path, capsys):
    """From grey outputs, at the default learning rate, mse alone does that; so it does in Keras's `fit`."""
    config = RunConfig(
        train_examples=5000,
        validation_examples=64,
        batch_size=64,
        epochs=1,
        loss=loss,
        bce_steps=0,
        initial_brightness=0.5,
    )
    trainer.train(config, tmp_path / "run")
    assert ("the same image" in capsys.readouterr().err) == warns


def test_loss_that_is_not_finite_stops_the_run_and_keeps_earlier_checkpoints(tmp_path, monkeypatch):
    def poisoned(images, config, first_step, replicas):
        numbered = training_batches(images, config, first_step, replicas).enumerate(first_step + 1)
        return numbered.map(lambda step, batch: batch._replace(noisy=tf.where(step == 14, np.nan, batch.noisy)))

    training_batches = trainer.training_batches
    monkeypatch.setattr(trainer, "training_batches", poisoned)
    with pytest.raises(RunError, match="step 14 is not finite"):
        trainer.train(TINY, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "report.json").exists()
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1]
    state = new_state()
    assert Checkpoints(tmp_path / "run" / "checkpoints", state).restore_latest()
    assert int(state.step) == 10


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "bcee"},
        {"model": "cnov"},
        {"noise": "x"},
        {"data": "/none.npz"},
        {"optimizer": "x"},
        {"schedule": "x"},
        {"data_digest": "other"},
    ],
)
def test_mistakes_are_found_before_anything_is_written(change, tmp_path):
    with pytest.raises(UsageError):
        trainer.train(replace(TINY, **change), tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []


def test_refused_resume_leaves_the_run_as_it_is(tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    with pytest.raises(UsageError, match=r"--batch-size was 64, now 32; --seed was 0, now 1"):
        trainer.train(replace(TINY, batch_size=32, seed=1), tiny_run, resume=True)
    with pytest.raises(UsageError, match="--epochs was 3, now 1"):
        trainer.train(replace(TINY, epochs=1), tiny_run, resume=True)
    with pytest.raises(UsageError, match="--data-digest was"):
        trainer.train(replace(TINY, data_digest="other"), tiny_run, resume=True)
    with pytest.raises(UsageError, match="already holds a run"):
        trainer.train(TINY, tiny_run)
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]"])
@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", "config.json"])
def test_a_resume_without_one_of_the_files_is_refused_in_one_line(name, content, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as caught:
        trainer.train(replace(TINY, epochs=4), run, resume=True, quiet=True)
    assert name in str(caught.value) or "--resume: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_signal_within_an_epoch_saves_and_the_resumed_run_gives_the_same_bits(tiny_run, tmp_path, monkeypatch):
    def progress_and_signal(self: Logger, epoch: int, images: int, loss: tf.Tensor) -> None:
        progress(self, epoch, images, loss)
        os.kill(os.getpid(), signal.SIGTERM)

    progress, handler = Logger.progress, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "progress", progress_and_signal)
        with pytest.raises(Interrupted, match=r"step 9.*--resume --run-dir") as caught:
            trainer.train(TINY, tmp_path / "run", quiet=True)
    assert caught.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert read_metrics(tmp_path / "run") == []
    assert [prefix.name for prefix in saved_in(tmp_path / "run" / "checkpoints" / "latest")] == ["ckpt-9"]
    trainer.train(TINY, tmp_path / "run", resume=True, quiet=True)
    assert_same_results(tmp_path / "run", tiny_run)


@pytest.mark.slow
def test_signal_before_the_first_step_is_deferred(tmp_path, monkeypatch):
    def signal_and_write_graph(self: Logger, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_graph(self, *arguments)

    write_graph = Logger.write_graph
    monkeypatch.setattr(Logger, "write_graph", signal_and_write_graph)
    with pytest.raises(Interrupted, match=r"step 9.*--resume --run-dir"):
        trainer.train(TINY, tmp_path / "run", quiet=True)


def test_signal_at_the_end_of_an_epoch_keeps_the_epoch(tmp_path):
    def interrupt(line: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"epoch 1.*--resume --run-dir") as caught:
        trainer.train(TINY, tmp_path / "run", quiet=True, on_epoch_end=interrupt)
    assert caught.value.signal_number == signal.SIGINT
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1]
    assert [prefix.name for prefix in saved_in(tmp_path / "run" / "checkpoints" / "latest")] == ["ckpt-10"]


def test_second_sigint_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_signals() as pending:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert sorted(pending) == [signal.SIGINT, signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_killed_within_an_epoch_is_resumed_to_the_same_bits(number, tiny_run, tmp_path):
    config = replace(TINY, checkpoint_every=1)
    (tmp_path / "config.json").write_text(config_module.to_json(config))
    command = [sys.executable, str(EXPERIMENTS / "run.py"), "--config", "config.json", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoints" / "latest" / "ckpt-2.index").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "--resume --run-dir run" in stderr
        assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "report.json").exists()
    trainer.train(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_results(tmp_path / "run", tiny_run)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let this process write at most `size` bytes to one file, as on a full disk; the error is another one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_full_disk_ends_the_run_with_an_error_and_it_can_be_resumed(resume, tiny_run, tmp_path):
    with file_size_limit(60_000), pytest.raises(RunError, match="--resume --run-dir"):  # checkpoints are larger
        trainer.train(TINY, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "report.json").exists()
    assert saved_in(tmp_path / "run" / "checkpoints" / "latest") == []
    if resume:
        trainer.train(TINY, tmp_path / "run", resume=True, quiet=True)
        assert first_difference(tmp_path / "run", tiny_run) is None


@pytest.mark.slow
def test_removed_folder_ends_the_run_with_an_error(tmp_path):
    with pytest.raises(RunError, match="--resume --run-dir"):
        trainer.train(TINY, tmp_path / "run", quiet=True, on_epoch_end=lambda line: shutil.rmtree(tmp_path / "run"))
