"""Estimate the noise in your images: `dae noise photos`; `--help` lists the flags."""

import dataclasses
from pathlib import Path

import tyro

from dae import cli
from dae.data.noise_level import combined, estimate_noise
from dae.errors import UsageError, as_usage_error
from dae.inference import denoise_files


@dataclasses.dataclass(frozen=True)
class NoiseLevelArguments:
    """Estimate the level of the noise in pictures and arrays, and report noise that is not white and Gaussian."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, .npy and .npz files, and folders of them."""
    value_range: tuple[float, float] | None = None
    """Values of black and white; None: 0 and 255 or 65535 for uint8 and uint16, 0 and 1 for floats."""
    axes: str | None = None
    """Axes of arrays, as --axes of denoise.py."""


def main() -> None:
    """Estimate the noise in the files that the command line names."""
    arguments = cli.parse(NoiseLevelArguments)
    levels = {}
    for name, images in denoise_files.read_images([Path(text) for text in arguments.inputs], arguments.axes):
        for number, image in enumerate(images):
            label = f"{name}, image {number}" if len(images) > 1 else name
            with as_usage_error(label):
                levels[label] = estimate_noise(image, arguments.value_range)
            print("; ".join([f"{label}: {levels[label].describe()}", *levels[label].problems()]))
    if not levels:
        raise UsageError("expected pictures, arrays or folders of them")
    total = combined([*levels.values()])
    print("; ".join([f"all ({len(levels)}): {total.describe()}", *total.problems()]))
    if not total.problems():
        print(f"for run.py: --noise-level {255 * total.sigma:.1f}/255")
