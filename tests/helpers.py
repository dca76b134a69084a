"""Helpers of the tests: a small configuration, parts of a run, ways to run the scripts, and content of files."""

import contextlib
import io
import os
import resource
import runpy
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings
from PIL import Image

from dae.config import RunConfig
from dae.data import noise
from dae.data.pipeline import Batch
from dae.data.values import ValueRange
from dae.errors import UsageError
from dae.losses import composite
from dae.losses.composite import CompositeLoss
from dae.losses.objective import Objective
from dae.models import networks
from dae.models.fused_layers import for_training
from dae.optimizers import optimizers
from dae.replicas import Replicas
from dae.resolved import Resolved
from dae.training.train_state import TrainState
from dae.training.train_step import TrainLoop, TrainStep, make_train_loop, make_train_step

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# Trains in seconds, with a smaller last batch: 600 images are 9 batches of 64 and one of 24.
TINY = RunConfig(train_examples=600, validation_examples=256, batch_size=64, epochs=3)

# What a run of TINY derives, but with digests that are not checked.
EIGHT_BITS = ValueRange(0.0, 255.0, "uint8")
RESOLVED = Resolved((0.5, 0.5), 0.13, (28, 28, 1), EIGHT_BITS, 256, 1, 1, True, data_digest="", weights_digest="")

# The same examples every time, so that a commit passes or fails its tests for good; and the time of one depends on what
# else is running.
settings.register_profile("dae", derandomize=True, deadline=None)
settings.load_profile("dae")
# The number of damaged or hostile inputs that each fuzz test tries.
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10")))


def run_subprocess(
    script: str, *arguments: object, cwd: Path | None = None, status: int = 0
) -> subprocess.CompletedProcess:
    """Run a script of experiments/ as a user does, from `cwd`, and assert its exit status."""
    command = [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"exit status {done.returncode}: {done.stderr}"
    return done


def ended(workers: Sequence[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Wait until all workers have ended, and return the exit status, stdout and stderr of each; kill them if late."""
    try:
        outputs = [worker.communicate(timeout=timeout) for worker in workers]
        return [(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]
    finally:
        for worker in workers:
            worker.kill()


def run_in_process(
    script: str, *arguments: object, cwd: Path | None = None, status: int = 0
) -> subprocess.CompletedProcess:
    """Run a script in this process, which saves six seconds for importing TensorFlow, and assert its exit status."""
    command, before = [str(EXPERIMENTS / script), *map(str, arguments)], os.getcwd()
    stdout, stderr = io.StringIO(), io.StringIO()
    os.chdir(cwd or before)
    try:
        with (
            mock.patch.object(sys, "argv", command),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as exit,
        ):
            runpy.run_path(command[0], run_name="__main__")
    finally:
        os.chdir(before)
    assert exit.value.code == status, f"exit status {exit.value.code}: {stderr.getvalue()}"
    return subprocess.CompletedProcess(command, status, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let this process write at most `size` bytes to one file, as on a full disk; the error is another one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def rejected(start: str = "", *words: str, match: str | None = None) -> Iterator[None]:
    """Assert that a mistake is rejected in one line, which begins with `start`, has these words and matches `match`."""
    with pytest.raises(UsageError, match=match) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(start)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def denoised_by_hand(model: keras.Model, noisy: np.ndarray) -> np.ndarray:
    """Return the denoised image of [H, W], which is mirrored at the bottom and right up to even sides."""
    height, width = noisy.shape
    mirrored = np.pad(noisy, ((0, -height % 2), (0, -width % 2)), "symmetric")
    return model(mirrored[None, ..., None], training=False).numpy()[:, :height, :width]


def photograph() -> np.ndarray:
    """Return a clean photograph in colour, float32 [300, 300, 3] in [0, 1]: the end of a picture of docs/pretrained.md.

    The most detail is in [:128, 60:188].
    """
    with Image.open(EXPERIMENTS.parent / "docs" / "images" / "cat.jpg") as figure:
        end = figure.crop((figure.width - 300, 18, figure.width, figure.height))
    return np.asarray(end, np.float32) / np.float32(255)


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    """Return the PSNR in dB of an image, both with values in [0, 1]."""
    return float(-10 * np.log10(np.mean((clean - image) ** 2)))


def idx_bytes(images: np.ndarray) -> bytes:
    """Return uint8 images as the content of an IDX file."""
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + images.tobytes()


def random_values(seed: int, *shape: int) -> np.ndarray:
    """Return normally distributed float32 values."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_of(noisy: np.ndarray | tf.Tensor, clean: np.ndarray | tf.Tensor) -> Batch:
    """Return a batch of these images, with noise levels and a seed of 0."""
    level = tf.zeros((len(clean), 1, 1, 1))
    return Batch(tf.convert_to_tensor(noisy), tf.convert_to_tensor(clean), level, tf.zeros([2], tf.int64))


def small_network(image_shape: tuple[int, int, int]) -> keras.Model:
    """Return a network of two layers, for tests in which the network does not matter."""
    noisy = keras.Input(image_shape)
    latents = keras.layers.Conv2D(2, 3, padding="same", activation="relu", name="encoder")(noisy)
    return keras.Model(noisy, keras.layers.Conv2D(image_shape[-1], 3, padding="same", activation="sigmoid")(latents))


def objective(
    loss: str | CompositeLoss = "bce", config: RunConfig = TINY, step: tf.Variable | None = None, total_steps: int = 30
) -> Objective:
    """Return the objective of a run with this loss, by default before its first step."""
    built = composite.build(loss, config.seed) if isinstance(loss, str) else loss
    corrupt = noise.corruption(config, noise.level_range(config, is_paired=False)[1])
    return Objective(built, config, corrupt, total_steps, tf.Variable(0, dtype=tf.int64) if step is None else step)


def not_the_identity(model: keras.Model) -> keras.Model:
    """Return `model`, with other weights than the zeros that some networks start with."""
    for number, weight in enumerate(model.trainable_weights):
        weight.assign_add(0.02 * tf.random.stateless_normal(weight.shape, (1, number)))
    return model


def new_state(
    config: RunConfig = TINY,
    optimizer: keras.optimizers.Optimizer | None = None,
    model: keras.Model | None = None,
    total_steps: int = 30,
) -> TrainState:
    """Return the state of a run on MNIST before its first step, by default of a network of two layers."""
    return TrainState(
        model or networks.build(RunConfig(**{**vars(config), "model": small_network}), (28, 28, 1)),
        composite.build(config.loss, config.seed),
        optimizer or optimizers.build(config, total_steps),
        config.max_gradient_norm,
    )


def new_train_step(state: TrainState, config: RunConfig, loss: CompositeLoss | None = None) -> TrainStep:
    """Return the train step of `state` for `loss`, by default that of `config`; if it has weights, pass it."""
    replicas = Replicas(shards=config.shards or 1)
    network = for_training(state.model, config.precision)
    return make_train_step(state, objective(loss or config.loss, config, state.step), network, replicas)


def new_train_loop(state: TrainState, config: RunConfig) -> TrainLoop:
    """Return the train loop of `state` for the loss of `config`."""
    return make_train_loop(new_train_step(state, config), state)


def apply_gradients(
    optimizer: keras.optimizers.Optimizer, starts: Sequence[np.ndarray], gradients: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return the weights after `optimizer` applied `gradients`, an array [steps, ...] for each of `starts`."""
    weights = [keras.Variable(start) for start in starts]
    optimizer.build(weights)
    apply = tf.function(lambda *step_gradients: optimizer.apply(list(step_gradients), weights))
    for step_gradients in zip(*gradients, strict=True):
        apply(*map(tf.constant, step_gradients))
    return [weight.numpy() for weight in weights]
