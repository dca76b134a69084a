"""Runs on several devices and workers have the bits of one; and their noise does not even depend on the shards."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import ended
from measure import RUN_SCRIPT, local_tf_configs, start_workers
from runs import config_of

from dae import config as config_module
from dae import replicas
from dae.analysis.reproducibility import first_difference
from dae.config import RunConfig, to_json
from dae.data.pipeline import training_batches
from dae.errors import RunError, UsageError
from dae.training import trainer
from dae.training.calls import loop_calls
from dae.training.task import prepare
from dae.training.train_step import make_train_loop, make_train_step
from dae.workdir.workdir import read_metrics

# Epochs end with a batch of one image, so that some shards, and some workers, have none.
SMALL: dict[str, Any] = {"train_examples": 97, "intra_op_threads": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "seen": {
        "loss": "{}/seen.py:seen",
        "augment": True,
        "noise_level": (0.1, 0.5),
        "model": "{}/networks.py:normalized",
    },
    "soap": {"shards": 4, "optimizer": "soap", "max_gradient_norm": 0.1, "ema_decay": 0.9},
    "losses": {"loss": "mse + 0.1*ssim + {}/losses.py:masked + {}/losses.py:Learned", "bce_steps": 5},
    "patches": {"data": "{}/pairs", "validation_examples": None, "train_examples": None, "patch_size": 16}
    | {"value_range": (0, 4095), "augment": True, "noise": "poisson", "noise_level": 0.1}
    | {"loss": "mse + 0.1*ssim + {}/losses.py:Learned", "bce_steps": 5},  # pairs have no second noise
}

# A squared error that writes a line for each noisy image that it sees: its level and its digest.
SEEN = """
import hashlib
import os
from pathlib import Path

import tensorflow as tf


def write(noisy, levels):
    lines = [f"{level:.9f} {hashlib.sha256(image.tobytes()).hexdigest()}\\n" for image, level in zip(noisy, levels)]
    file = os.open(Path(__file__).with_name("seen.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, "".join(lines).encode())
    os.close(file)


def seen(clean, denoised, *, noisy, noise_level):
    written = tf.numpy_function(write, [noisy, tf.reshape(noise_level, [-1])], [])
    with tf.control_dependencies([written]):
        return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
"""


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """A folder with a file for each of CONFIGS."""
    (tmp_path / "seen.py").write_text(SEEN)
    for name in CONFIGS:
        (tmp_path / f"{name}.json").write_text(to_json(config(name, files, tmp_path)))
    return tmp_path


def config(name: str, files: Path, folder: Path, **changes: Any) -> RunConfig:
    own = {
        field: value.replace("{}/seen.py", f"{folder}/seen.py") if isinstance(value, str) else value
        for field, value in CONFIGS[name].items()
    }
    return config_of(files, **{**SMALL, **own, **changes})


def one_process(folder: Path, name: str, run_dir: str, devices: Sequence[str] = (), resume: bool = False) -> None:
    """Train one of CONFIGS in this process, or resume it."""
    saved = config_module.read(folder / f"{name}.json")
    trainer.train(saved, folder / run_dir, devices=devices, resume=resume, quiet=True)


def start_run(workers: int, *arguments: object, cwd: Path) -> list[subprocess.Popen]:
    """Start run.py as this many workers on this machine, the chief first. The test must end them."""
    command = [sys.executable, RUN_SCRIPT, *map(str, arguments)]
    return start_workers(command, workers, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def several_workers(folder: Path, count: int, name: str, run_dir: str, *arguments: str) -> None:
    """Train the run with `count` workers, of which only the chief may print."""
    workers = ended(start_run(count, "--config", f"{name}.json", "--run-dir", run_dir, *arguments, cwd=folder))
    assert [status for status, *_ in workers] == [0] * count, workers
    assert f"with {count} workers" in workers[0][1]
    assert [output for _, output, _ in workers[1:]] == [""] * (count - 1)
    assert all("run.py" not in errors and "warning" not in errors for *_, errors in workers[1:])


def images_seen(folder: Path) -> set[str]:
    """Return what SEEN has written, and remove it."""
    lines = set((folder / "seen.txt").read_text().splitlines())
    (folder / "seen.txt").unlink()
    return lines


def test_the_noise_that_a_train_step_sees_does_not_depend_on_the_number_of_shards(files, folder):
    """Nor do patches, flips and rotations, and noise levels."""
    seen = {}
    for shards in (1, 2, 4):
        task = prepare(config("seen", files, folder, shards=shards, model="{}/networks.py:plain"))
        state = task.new_state()
        train_step = make_train_step(state, task.objective(state.step), task.network, task.replicas)
        train_loop, batches = make_train_loop(train_step, state), iter(training_batches(task.data.train, task.config))
        while int(state.step) < task.total_steps:
            for call in loop_calls(task, int(state.step)):
                train_loop(batches, call.num_steps, call.batch_size)
        seen[shards] = images_seen(folder)
    # Two epochs of 97 images, and the images of zeros and ones that check the loss.
    assert 2 * 97 <= len(seen[1]) <= 2 * 97 + 10
    assert len({line.partition(" ")[0] for line in seen[1]}) >= 2 * 97
    assert seen[1] == seen[2] == seen[4]


@pytest.mark.slow
def test_two_workers_see_the_noise_of_one_process_and_give_its_bits(folder):
    one_process(folder, "seen", "one")
    expected = images_seen(folder)
    several_workers(folder, 2, "seen", "two")
    assert images_seen(folder) == expected
    assert len(expected) >= 2 * 97 + 97 + 40 + 4
    assert first_difference(folder / "one", folder / "two") is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("soap", 4), ("patches", 2)])
def test_any_number_of_devices_and_workers_gives_the_same_bits(name, count, folder):
    one_process(folder, name, "one")
    devices = [f"cpu:{number}" for number in range(count)]
    one_process(folder, name, "devices", devices)
    assert first_difference(folder / "one", folder / "devices") is None
    several_workers(folder, count, name, "workers")
    assert first_difference(folder / "one", folder / "workers") is None


def wait_for_an_epoch(run: Path, workers: list[subprocess.Popen], epochs_before: int) -> None:
    """Wait until the run has more epochs, while all workers run."""
    end = time.monotonic() + 100
    while not (run.exists() and len(read_metrics(run)) > epochs_before):
        assert time.monotonic() < end
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.05)


@pytest.mark.slow
def test_workers_of_which_one_is_killed_or_has_a_signal_all_end_and_any_number_resumes(files, folder):
    """A killed worker ends the others; a signal to any of them saves and stops all.

    test_benchmarks.py has a run whose second worker is killed.
    """
    of_seconds = config("losses", files, folder, epochs=40, checkpoint_every=3)
    (folder / "long.json").write_text(to_json(of_seconds))
    one_process(folder, "long", "one")
    run, epochs = folder / "two", 0
    for stopped, number in ((1, signal.SIGUSR1), (0, signal.SIGKILL)):
        workers = start_run(2, "--config", "long.json", "--run-dir", "two", "--resume", cwd=folder)
        wait_for_an_epoch(run, workers, epochs)
        workers[stopped].send_signal(number)
        start = time.monotonic()
        outputs = ended(workers, timeout=60)
        assert time.monotonic() - start < 30
        if number == signal.SIGKILL:
            assert outputs[stopped][0] == -signal.SIGKILL
            status, _, errors = outputs[1 - stopped]
            assert status == 1
            assert "run.py: another worker has stopped: " in errors
            assert "continue with --resume --run-dir two" in errors
        else:
            for status, _, errors in outputs:
                assert status == 128 + number
                assert "stopped and saved after" in errors
        assert not (run / "report.json").exists()
        epochs = len(read_metrics(run))
    assert epochs < 40
    one_process(folder, "long", "two", resume=True)
    assert first_difference(folder / "one", run) is None


DIFFERENT = """
import json
import os

import keras
import tensorflow as tf


class Different(keras.Layer):
    '''A squared error that also changes a weight, from the fourth step on, to the number of the worker.'''

    def __init__(self):
        super().__init__()
        self.number = self.add_weight(initializer="zeros", trainable=False)

    def call(self, clean, denoised, *, step):
        number = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
        self.number.assign(tf.where(step < 3, self.number, float(number)))
        return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
"""


@pytest.mark.slow
def test_workers_whose_weights_differ_fail(folder):
    (folder / "different.py").write_text(DIFFERENT)
    loss = ("--loss", "different.py:Different", "--bce-steps", 0)
    for status, _, errors in ended(start_run(2, "--config", "losses.json", *loss, "--run-dir", "run", cwd=folder)):
        assert status == 1
        assert "the weights of worker 1 differ from those of worker 0 after step 7" in errors
    assert not list((folder / "run" / "checkpoints" / "latest").glob("ckpt-7*"))


@pytest.mark.slow
def test_workers_with_other_settings_are_rejected(folder):
    command = [sys.executable, RUN_SCRIPT, "--config", "soap.json", "--run-dir", "run", "--seed"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([*command, str(seed)], cwd=folder, env={**os.environ, "TF_CONFIG": tf_config}, **pipes)
        for seed, tf_config in enumerate(local_tf_configs(2))
    ]
    for status, _, errors in ended(workers):
        assert status == 2
        assert "worker 1 has another configuration than worker 0: seed 1, not 0" in errors
    assert not (folder / "run").exists()


def test_waiting_for_a_worker_that_does_not_start_ends(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as own, socket.create_server(("127.0.0.1", 0)) as other:
        addresses = tuple(f"127.0.0.1:{server.getsockname()[1]}" for server in (own, other))
    monkeypatch.setattr(replicas, "JOIN_TIMEOUT", 0.2)
    with pytest.raises(RunError, match=rf"^worker 0 has waited 0.2 s for {addresses[1]}; start all workers"):
        replicas.Replicas((), 0, addresses).connect()
    with socket.create_server(("", int(addresses[0].split(":")[1]))):  # noqa: SIM117
        with pytest.raises(UsageError, match=f"^TF_CONFIG: {addresses[0]}: cannot listen there"):
            replicas.Replicas((), 0, addresses).connect()
