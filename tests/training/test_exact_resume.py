"""A run that is stopped anywhere and resumed has the bits of one that was not."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import EXPERIMENTS
from runs import ROWS, config_of

from dae.analysis.reproducibility import first_difference
from dae.data.noise import NOISES
from dae.training import trainer
from dae.training.checkpoints import saved_in
from dae.workdir.model_files import load_model


def latest_step(run: Path) -> int:
    return int(saved_in(run / "checkpoints" / "latest")[-1].name.removeprefix("ckpt-"))


def assert_same(run: Path, other: Path) -> None:
    """Assert that the results are identical, also the weights in the model files, which hold dates as well."""
    assert first_difference(run, other) is None
    weights, expected = (load_model(folder).get_weights() for folder in (run, other))
    assert all(map(np.array_equal, weights, expected))


def test_every_noise_model_is_in_a_row():
    assert {row.get("noise", "gaussian") for row in ROWS.values()} >= set(NOISES)


def as_if_killed(finished: Path, run: Path, step: int) -> None:
    """Copy a finished run to `run`, as if it had been killed in the middle of an event after the step `step`."""
    shutil.copytree(finished, run)
    (run / "report.json").unlink()
    for file in (run / "tensorboard").rglob("events*"):
        file.write_bytes(file.read_bytes()[:-7])
    for file in (run / "checkpoints" / "latest").glob("ckpt-*"):
        if int(file.stem.removeprefix("ckpt-")) > step:
            file.unlink()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("pairs", 6),
        pytest.param("sum", 8, marks=pytest.mark.slow),
        pytest.param("functions", 12, marks=pytest.mark.slow),
        pytest.param("start_from", 8, marks=pytest.mark.slow),
        pytest.param("bfloat16", 12, marks=pytest.mark.slow),
        pytest.param("photo", 6, marks=pytest.mark.slow),
        pytest.param("noisy", 6, marks=pytest.mark.slow),
        pytest.param("published_attention", 12, marks=pytest.mark.slow),
        pytest.param("published_spectral", 12, marks=pytest.mark.slow),
        pytest.param("published_variational", 12, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_from_within_an_epoch_to_the_same_bits(name, step, finished_run, files, tmp_path):
    """Lines of metrics.jsonl, TensorBoard's events and files that are newer than the checkpoint are replaced."""
    as_if_killed(finished_run(name), tmp_path / "run", step)
    assert latest_step(tmp_path / "run") == step
    trainer.train(config_of(files, name), tmp_path / "run", resume=True, quiet=True)
    assert_same(tmp_path / "run", finished_run(name))


@pytest.mark.slow
def test_processes_that_were_stopped_and_killed_are_resumed_to_the_same_bits(finished_run, files, tmp_path):
    """With the number of threads that the run's resolved.json has; nothing else is printed on stderr."""
    expected, run = finished_run("network"), tmp_path / "run"
    command = [sys.executable, str(EXPERIMENTS / "run.py"), "--config", f"{expected}/config.json", "--run-dir", "run"]
    for checkpoint, number in (("ckpt-4", signal.SIGINT), ("ckpt-8", signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (run / "checkpoints" / "latest" / f"{checkpoint}.index").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert stderr.startswith("run.py: stopped and saved after ")
            assert stderr.endswith("--resume --run-dir run\n")
            assert stderr.count("\n") == 1
        assert not (run / "report.json").exists()
        command = [*command[:2], "--resume", "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 2/2: train loss" in done.stdout
    assert_same(run, expected)
