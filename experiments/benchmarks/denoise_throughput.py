"""Compare the throughput of denoising with that of the network alone: `python .../denoise_throughput.py`."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from dae import cli
from dae.config import RunConfig
from dae.data import datasets
from dae.errors import UsageError, lookup


@dataclasses.dataclass(frozen=True)
class ThroughputArguments:
    """Time, in turn, `Denoiser` and the compiled forward pass of its network on float pixels, in memory.

    The images are the 10,000 test digits, and a picture of 24 megapixels made of them.
    """

    models: tuple[str, ...] = ("conv", "patches")
    """Networks, with random weights."""
    rounds: int = 5
    """Timed repetitions of each, after one for warm-up."""


def picture(digits: np.ndarray) -> np.ndarray:
    """Return digits [N, 28, 28, 1] as one picture, uint8 [1, 4004, 6020, 1]."""
    rows, columns = 143, 215
    many = digits[np.arange(rows * columns) % len(digits)].reshape(rows, columns, 28, 28)
    return many.swapaxes(1, 2).reshape(1, rows * 28, columns * 28, 1)


def alone(forward: Callable[[Any], Any], parts: list[Any]) -> None:
    """Compute the outputs of the parts, float tensors, one after the other."""
    for part in parts:
        forward(part).numpy()


def seconds_in_turn(functions: dict[str, Callable[[], object]], rounds: int, label: str) -> dict[str, float]:
    """Return the median of the seconds that each function takes."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in tqdm(range(rounds + 1), desc=label, disable=None, leave=False):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    arguments = cli.parse(ThroughputArguments)
    if arguments.rounds < 1:
        raise UsageError(f"--rounds: expected a whole number >= 1, got {arguments.rounds}")
    cli.import_tensorflow()
    import tensorflow as tf

    from dae import runtime
    from dae.inference.denoise import Denoiser
    from dae.models import networks, sizes
    from dae.models.fused_layers import fused

    for name in arguments.models:
        lookup(networks.MODELS, name, "--models")
    runtime.resolve(RunConfig(), whole_batches=True)
    digits = datasets.load(RunConfig()).test.pixels
    large = picture(digits)
    print("| network | images | denoise, megapixels/s | network alone, megapixels/s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.models:
        model = sizes.any_size(networks.build(RunConfig(model=name), (28, 28, 1)))
        forward = tf.function(
            lambda values, model=model: fused(model, training=False)(values).denoised,
            input_signature=[tf.TensorSpec([None, None, None, 1], tf.float32)],
        )
        denoiser = Denoiser(model)
        # The network alone gets 334 digits at a time, or a quarter of the picture, in sizes that all networks take.
        parts = {
            "10,000 digits": [digits[start : start + 334] for start in range(0, len(digits), 334)],
            "24-megapixel picture": [large[:, row : row + 1028, :] for row in range(0, 4004 - 1028 + 1, 992)],
        }
        for label, images in (("10,000 digits", digits), ("24-megapixel picture", large)):
            floats = [tf.constant(part / np.float32(255)) for part in parts[label]]
            pixels = {"denoise": images.size, "forward": sum(part.size for part in parts[label])}
            functions: dict[str, Callable[[], object]] = {
                "denoise": functools.partial(denoiser, images),
                "forward": functools.partial(alone, forward, floats),
            }
            timed = seconds_in_turn(functions, arguments.rounds, f"{name}, {label}")
            speeds = {way: pixels[way] / timed[way] / 1e6 for way in timed}
            ratio = speeds["denoise"] / speeds["forward"]
            print(f"| {name} | {label} | {speeds['denoise']:.1f} | {speeds['forward']:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    cli.run(main)
