"""Runs on several devices and workers, which must have the same bits as on one."""

import dataclasses
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import TINY, ended, start_workers

from dae import config as config_module
from dae import replicas
from dae.analysis.reproducibility import first_difference
from dae.config import to_json
from dae.errors import RunError, UsageError
from dae.training import trainer
from dae.workdir.workdir import read_metrics, read_report

# Epochs end with a batch of one image, so that some shards, and some workers, have none.
CONFIG = dataclasses.replace(TINY, train_examples=577, epochs=2, shards=2, intra_op_threads=1)

LOSSES = """
import keras
import tensorflow as tf


def masked(clean, denoised, *, seed):
    mask = tf.cast(tf.random.stateless_uniform(tf.shape(clean), seed) < 0.5, tf.float32)
    return tf.reduce_mean(mask * tf.abs(clean - denoised), axis=[1, 2, 3])


class Scaled(keras.Layer):
    '''A squared error, with a weight that `update` moves to the mean brightness.'''

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(initializer="ones", trainable=False)

    def call(self, clean, denoised):
        return (1 + 0 * self.scale) * tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])

    def update(self, clean, denoised, *, noisy, denoise):
        self.scale.assign(0.9 * self.scale + 0.05 * tf.reduce_mean(denoised) + 0.05 * tf.reduce_mean(denoise(noisy)))
"""

NETWORKS = """
from keras import Input, Model, layers, regularizers


def normalized(image_shape):
    image = x = Input(image_shape)
    x = layers.Conv2D(8, 3, padding="same", kernel_regularizer=regularizers.L2(1e-4))(x)
    x = layers.Dropout(0.2)(layers.ReLU()(layers.BatchNormalization()(x)))
    return Model(image, layers.Conv2D(image_shape[-1], 3, padding="same", activation="sigmoid")(x))
"""

CONFIGS = {
    "adam": dataclasses.replace(CONFIG, shards=4),
    "soap": dataclasses.replace(CONFIG, shards=4, optimizer="soap", max_gradient_norm=0.1, ema_decay=0.9),
    "losses": dataclasses.replace(CONFIG, loss="mse + 0.1*ssim + losses.py:masked + losses.py:Scaled", bce_steps=5),
    "network": dataclasses.replace(
        CONFIG, model="networks.py:normalized", loss="bce + losses.py:Scaled", noise_level=(0.1, 0.5), patience=1
    ),
    "patches": dataclasses.replace(CONFIG, model="unet", patch_size=16, augment=True, noise="poisson"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with users' files and a file for each of CONFIGS."""
    (tmp_path / "losses.py").write_text(LOSSES)
    (tmp_path / "networks.py").write_text(NETWORKS)
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(to_json(config))
    return tmp_path


def one_process(folder: Path, name: str, run_dir: str, devices: Sequence[str] = (), resume: bool = False) -> None:
    """Train one of CONFIGS in this process, or resume it."""
    config = config_module.read(folder / f"{name}.json")
    trainer.train(config, folder / run_dir, devices=devices, resume=resume, quiet=True)


def several_workers(folder: Path, count: int, name: str, run_dir: str, *arguments: str) -> None:
    """The same, with so many workers, of which only the chief may print."""
    workers = ended(start_workers(count, "--config", f"{name}.json", "--run-dir", run_dir, *arguments, cwd=folder))
    assert [status for status, *_ in workers] == [0] * count, workers
    assert f"with {count} workers" in workers[0][1]
    assert [output for _, output, _ in workers[1:]] == [""] * (count - 1)
    assert all("run.py" not in errors and "warning" not in errors for *_, errors in workers[1:])


def test_two_workers_give_the_bits_of_one_process(folder):
    small = dataclasses.replace(CONFIG, train_examples=129, validation_examples=100, epochs=1, shards=2)
    (folder / "small.json").write_text(to_json(small))
    one_process(folder, "small", "one")
    several_workers(folder, 2, "small", "two")
    assert first_difference(folder / "one", folder / "two") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_devices_and_workers_gives_the_same_bits(name, folder):
    one_process(folder, name, "one")
    count = 4 if name == "adam" else 2
    devices = [f"cpu:{number}" for number in range(count)]
    one_process(folder, name, "devices", devices)
    assert first_difference(folder / "one", folder / "devices") is None
    if name == "patches":  # tests/data/test_pipeline.py compares the patches that workers make
        return
    several_workers(folder, count, name, "workers", *(["--devices", *devices] if name == "soap" else []))
    assert first_difference(folder / "one", folder / "workers") is None


def wait_for(path: Path, workers: list[subprocess.Popen]) -> None:
    """Wait until a file has content, while all workers run."""
    end = time.monotonic() + 100
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < end
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "resumed_with"), [(0, 2), (1, 1)])
def test_a_killed_worker_ends_the_others_and_any_number_resumes(killed, resumed_with, folder):
    long = dataclasses.replace(CONFIGS["losses"], train_examples=2000, epochs=3, checkpoint_every=3)
    (folder / "long.json").write_text(to_json(long))
    one_process(folder, "long", "one")
    workers = start_workers(2, "--config", "long.json", "--run-dir", "two", "--resume", cwd=folder)
    wait_for(folder / "two" / "metrics.jsonl", workers)
    workers[killed].kill()
    start = time.monotonic()
    outputs = ended(workers, timeout=60)
    assert time.monotonic() - start < 30
    assert outputs[killed][0] == -signal.SIGKILL
    status, _, errors = outputs[1 - killed]
    assert status == 1
    assert "run.py: another worker has stopped: " in errors
    assert "continue with --resume --run-dir two" in errors
    assert not (folder / "two" / "report.json").exists()
    assert 1 <= len(read_metrics(folder / "two")) < 3
    if resumed_with == 1:
        one_process(folder, "long", "two", resume=True)
    else:
        several_workers(folder, resumed_with, "long", "two", "--resume")
    assert first_difference(folder / "one", folder / "two") is None


@pytest.mark.slow
def test_a_signal_to_any_worker_saves_and_stops_all(folder):
    (folder / "long.json").write_text(to_json(dataclasses.replace(CONFIG, train_examples=10_000, epochs=2)))
    one_process(folder, "long", "one")
    workers = start_workers(2, "--config", "long.json", "--run-dir", "two", cwd=folder)
    wait_for(folder / "two" / "metrics.jsonl", workers)
    workers[1].send_signal(signal.SIGUSR1)
    for status, _, errors in ended(workers, timeout=60):
        assert status == 128 + signal.SIGUSR1
        assert "stopped and saved after" in errors
    several_workers(folder, 2, "long", "two", "--resume")
    assert first_difference(folder / "one", folder / "two") is None


@pytest.mark.slow
def test_fast_reduction_of_two_workers_has_only_one_order(folder):
    one_process(folder, "adam", "one")
    several_workers(folder, 2, "adam", "two", "--reduction", "fast")
    assert read_report(folder / "one") == read_report(folder / "two")


@pytest.mark.slow
def test_workers_whose_weights_differ_fail(folder):
    (folder / "losses.py").write_text(
        LOSSES.replace("0.9 * self.scale", "1.0 * json.loads(os.environ['TF_CONFIG'])['task']['index']").replace(
            "import keras", "import json\nimport os\nimport keras"
        )
    )
    for status, _, errors in ended(start_workers(2, "--config", "losses.json", "--run-dir", "two", cwd=folder)):
        assert status == 1
        assert "the weights of worker 1 differ from those of worker 0 after step 10" in errors
    assert not list((folder / "two" / "checkpoints" / "latest").glob("*"))


@pytest.mark.slow
def test_workers_with_other_settings_are_refused(folder):
    workers = start_workers(2, "--config", "adam.json", "--run-dir", "run", cwd=folder, last=["--seed", 1])
    for status, _, errors in ended(workers):
        assert status == 2
        assert "worker 1 has another configuration than worker 0 (--seed was 0, now 1)" in errors
    assert not (folder / "run").exists()


def test_waiting_for_a_worker_that_does_not_start_ends(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as own, socket.create_server(("127.0.0.1", 0)) as other:
        addresses = tuple(f"127.0.0.1:{each.getsockname()[1]}" for each in (own, other))
    monkeypatch.setattr(replicas, "JOIN_TIMEOUT", 0.2)
    with pytest.raises(RunError, match=rf"^worker 0 has waited 0.2 s for {addresses[1]}; start the same command"):
        replicas.Replicas((), 0, addresses).connect()
    with socket.create_server(("", int(addresses[0].split(":")[1]))):  # noqa: SIM117
        with pytest.raises(UsageError, match=f"^TF_CONFIG: cannot listen at {addresses[0]}"):
            replicas.Replicas((), 0, addresses).connect()
