"""The programs that the benchmarks time; the class Program of measure.py runs each in a separate process.

python experiments/benchmarks/programs.py NAME SETTINGS RUN_DIR

SETTINGS are fields of RunConfig as JSON; a run is written to RUN_DIR. After each epoch a program prints its `seconds`,
those of processor time, `processor`, the process's peak memory in `megabytes`, and what else it knows, as JSON on
stdout, and waits for a line on stdin.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol

import numpy as np

from dae import cli
from dae.config import RunConfig
from dae.data import datasets
from dae.errors import lookup

NOISE_LEVEL = 0.5  # that of the tutorial


class Lap(Protocol):
    """Ends an epoch, with what is known about it, and starts the next."""

    def __call__(self, known: Mapping[str, Any], untimed: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Report `known`, and what `untimed` returns, whose time belongs to no epoch."""


# Starts the first epoch; called when all imports are done.
Start = Callable[[], Lap]


def stopwatch(output: IO[str]) -> Lap:
    """Start the first epoch; what is known about each epoch is written to `output`."""
    started, used = time.perf_counter(), time.process_time()

    def lap(known: Mapping[str, Any], untimed: Callable[[], Mapping[str, Any]] = dict) -> None:
        nonlocal started, used
        times = {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**known, **untimed(), **times, "megabytes": megabytes}), file=output, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started, used = time.perf_counter(), time.process_time()

    return lap


def dae_train(config: RunConfig, start: Start) -> None:
    """Train with this package as a user does: with all metrics, summaries and checkpoints."""
    cli.import_tensorflow()
    from dae.training.trainer import train

    lap = start()
    train(config, sys.argv[3], on_epoch_end=lambda epoch_end: lap(epoch_end.values))


def fit(config: RunConfig, start: Start) -> None:
    """Train with Keras's `fit` as the tutorial does, on noise made once, with the validation images of `config`."""
    os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)  # set by dae; the tutorial leaves it to TensorFlow
    cli.import_tensorflow()
    import keras

    from dae.data import pipeline
    from dae.models import networks

    lap = start()
    splits = datasets.load(config)
    keras.utils.set_random_seed(config.seed)
    model = networks.build(config, splits.train.image_shape)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    noisy, clean = with_noise(splits.train.pixels)
    batches = list(pipeline.evaluation_batches(splits.validation, config, "validation"))
    validation = [np.concatenate([getattr(batch, name) for batch in batches]) for name in ("noisy", "clean")]
    for epoch in itertools.count(1):
        model.fit(noisy, clean, batch_size=config.batch_size, shuffle=True, validation_data=validation, verbose=0)
        lap({}, functools.partial(test_psnr, model.predict_on_batch, config) if epoch == config.epochs else dict)


def pytorch(config: RunConfig, start: Start, compiled: bool = False) -> None:
    """Train with PyTorch in the layout channels_last, with noise made for every batch; no validation."""
    import torch
    import torch_networks

    torch.manual_seed(config.seed)
    lap, layout = start(), {"memory_format": torch.channels_last}
    model = lookup(torch_networks.NETWORKS, config.model, "--model")(config.width).to(**layout)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-7)
    images = torch.from_numpy(np.ascontiguousarray(datasets.load(config).train.pixels.transpose(0, 3, 1, 2)))

    def loss_of(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(model(noisy), clean)

    def denoise(noisy: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return torch.sigmoid(model(torch.from_numpy(noisy.transpose(0, 3, 1, 2)))).numpy().transpose(0, 2, 3, 1)

    compute = torch.compile(loss_of) if compiled else loss_of
    for epoch in itertools.count(1):
        for indices in torch.randperm(len(images)).split(config.batch_size):
            clean = (images[indices].float() / 255).contiguous(**layout)
            noisy = (clean + NOISE_LEVEL * torch.randn_like(clean)).clamp(0, 1)
            optimizer.zero_grad()
            compute(noisy, clean).backward()
            optimizer.step()
        lap({}, functools.partial(test_psnr, denoise, config) if epoch == config.epochs else dict)


def with_noise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (noisy, clean), float32 in [0, 1], for uint8 images, with NumPy's global random numbers."""
    clean = images.astype(np.float32) / 255
    noisy = np.clip(clean + np.random.normal(0, NOISE_LEVEL, clean.shape), 0, 1)
    return noisy.astype(np.float32), clean


def test_psnr(denoise: Callable[[np.ndarray], np.ndarray], config: RunConfig) -> dict[str, float]:
    """Return the mean PSNR of the denoised test images, without TensorFlow, beside which PyTorch may crash."""
    noisy, clean = with_noise(datasets.load(config).test.pixels)
    errors = [
        ((denoise(noisy[i : i + 500]) - clean[i : i + 500]) ** 2).mean((1, 2, 3)) for i in range(0, len(clean), 500)
    ]
    return {"test_psnr": float(np.mean(-10 * np.log10(np.concatenate(errors))))}


def limit(config: RunConfig, start: Start) -> None:
    """Multiply float32 matrices of 2,048 x 2,048 twenty times per epoch, which shows what the processor can do.

    Reports the number of `images` for which the convolutions of a training step take as many operations.
    """
    cli.import_tensorflow()
    import tensorflow as tf

    from dae.models import networks

    model = networks.build(config, datasets.load(config).train.image_shape)
    images = 20 * 2 * 2048**3 / operations_per_image(model)
    matrix = tf.random.stateless_normal((2048, 2048), seed=(0, 1))
    lap = start()
    while True:
        for _ in range(20):
            tf.matmul(matrix, matrix).numpy()
        lap({"images": images})


def operations_per_image(model: Any) -> int:
    """Return the floating-point operations of one image's training step in the convolutions of a keras.Model.

    Forward pass, gradient of the weights and gradient of the inputs cost the same; the first layer lacks the last one.
    """
    import keras

    forward = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose):
            # The kernel is multiplied at each pixel of the output, or of the input if the convolution is transposed.
            pixels = layer.output if isinstance(layer, keras.layers.Conv2D) else layer.input
            forward.append(2 * math.prod(pixels.shape[1:3]) * math.prod(layer.kernel.shape))
    return 3 * sum(forward) - forward[0]


def pipeline_alone(config: RunConfig, start: Start) -> None:
    """Produce the training batches of this package without using them."""
    cli.import_tensorflow()
    from dae.data import pipeline
    from dae.training.task import prepare

    lap = start()
    task = prepare(config)
    for step, _ in enumerate(pipeline.training_batches(task.data.train, config), 1):
        if step % task.steps_per_epoch == 0:
            lap({})


def train_loop(config: RunConfig, start: Start, with_pipeline: bool = False) -> None:
    """Take an epoch of whole batches in one call of the train loop, together with the other workers if there are any.

    Takes the same batch over and over, unless `with_pipeline`. Reports the `bytes` that a worker sends per step.
    """
    cli.import_tensorflow()
    from dae import replicas
    from dae.data.pipeline import training_batches
    from dae.training.task import prepare
    from dae.training.train_step import make_train_loop, make_train_step

    lap, group = start(), replicas.from_environment()
    task = prepare(config, replicas=group)
    state = task.new_state()
    step = make_train_step(state, task.objective(state.step), task.network, task.replicas)
    loop = make_train_loop(step, state)
    batches = training_batches(task.data.train, config)
    batches = iter(batches if with_pipeline else batches.take(1).cache().repeat())
    values = sum(math.prod(weight.shape) for weight in state.trainable_variables) + len(task.loss.names)
    while True:
        loop(batches, task.steps_per_epoch, config.batch_size)
        lap({"bytes": 4 * values, "images": task.steps_per_epoch * config.batch_size})


MESSAGE_SIZES = (1_000, 10_000, 100_000, 1_000_000)
MESSAGES = 200


def messages(config: RunConfig, start: Start) -> None:
    """Gather tensors of several sizes from all workers; reports pairs of bytes and seconds per message."""
    cli.import_tensorflow()
    import tensorflow as tf

    from dae import replicas

    lap, group = start(), replicas.from_environment()
    group.connect()

    @tf.function
    def gather(own: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0.0)
        for _ in tf.range(MESSAGES):
            total += tf.reduce_sum(group.gather(own + total)[:, 0])
        return total

    while True:
        found = []
        for size in MESSAGE_SIZES:
            started = time.perf_counter()
            gather(tf.zeros([1, size]))
            found.append((4 * size, (time.perf_counter() - started) / MESSAGES))
        lap({"messages": found})


def denoise(config: RunConfig, start: Start, network_alone: bool = False) -> None:
    """Denoise a picture of 24 megapixels, made of test digits; its `images` are these digits.

    With `network_alone`, compute the compiled network on float pixels instead, in four strips that do not overlap.
    """
    cli.import_tensorflow()
    import tensorflow as tf

    from dae.inference.denoise import Denoiser
    from dae.models import networks, sizes
    from dae.models.fused_layers import fused

    digits = datasets.load(config).test.pixels
    model = sizes.any_size(networks.build(config, digits.shape[1:]))
    rows, columns = 144, 215
    tiles = digits[np.arange(rows * columns) % len(digits)].reshape(rows, columns, 28, 28)
    picture = tiles.swapaxes(1, 2).reshape(1, rows * 28, columns * 28, 1)
    denoiser, parts = Denoiser(model), [picture]
    if network_alone:
        parts = [tf.constant(strip / np.float32(255)) for strip in np.split(picture, 4, axis=1)]
        denoiser = tf.function(lambda pixels: fused(model, training=False)(pixels).denoised)
    lap = start()
    while True:
        for part in parts:
            np.asarray(denoiser(part))
        lap({"images": rows * columns})


PROGRAMS: dict[str, Callable[[RunConfig, Start], None]] = {
    "dae": dae_train,
    "fit": fit,
    "PyTorch": pytorch,
    "PyTorch compile": functools.partial(pytorch, compiled=True),
    "limit": limit,
    "pipeline": pipeline_alone,
    "train step": train_loop,
    "denoise": denoise,
    "network alone": functools.partial(denoise, network_alone=True),
    # Of growth.py.
    "several workers": functools.partial(train_loop, with_pipeline=True),
    "messages": messages,
}


def main() -> None:
    name, settings, _ = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on stdout goes to stderr
    with contextlib.suppress(KeyboardInterrupt):
        PROGRAMS[name](RunConfig(**json.loads(settings)), functools.partial(stopwatch, output))


if __name__ == "__main__":
    main()
