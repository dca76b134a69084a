"""Measure models on the standard photographs, beside published figures: `standard_photographs.py FOLDER`.

FOLDER contains Set12, BSD68 and CBSD68. The protocol is that of the field: white Gaussian noise, neither clipped nor
rounded; the mean of the PSNR over the denoised pictures, which are clipped.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from measure import table

from dae import cli
from dae.config import RunConfig
from dae.errors import UsageError, lookup

if TYPE_CHECKING:
    import keras

    from dae.data.images import Images

# Of noisy pictures [N, H, W, C].
Denoise = Callable[[Any], np.ndarray]
# Standard deviations of the noise, of 255. With 0, the denoiser gets the clean picture.
SIGMAS = (0, 15, 25, 50)
# PSNR in dB at SIGMAS, as published: (1) Zhang et al., Beyond a Gaussian Denoiser (2017), and the repository of its
# authors; (2) Zhang, Zuo and Zhang, FFDNet (2018); (3) as quoted by later publications. "One level" is a network for
# each level.
PUBLISHED = {
    "Set12": {
        "BM3D, given the level (1)": ("", "32.37", "29.97", "26.72"),
        "DnCNN, one level, 556 k weights (1)": ("", "32.86", "30.44", "27.18"),
        "FFDNet, given the level, 486 k weights (2)": ("", "32.75", "30.43", "27.32"),
    },
    "BSD68": {
        "BM3D, given the level (1)": ("", "31.07", "28.57", "25.62"),
        "DnCNN, one level, 556 k weights (1)": ("", "31.73", "29.23", "26.23"),
        "DnCNN-B, blind, 668 k weights (1)": ("", "31.61", "29.16", "26.23"),
        "FFDNet, given the level, 486 k weights (2)": ("", "31.63", "29.19", "26.29"),
    },
    "CBSD68": {
        "CBM3D, given the level (3)": ("", "33.50", "30.68", "27.36"),
        "DnCNN, 673 k weights (3)": ("", "33.99", "31.31", "28.01"),
    },
}


@dataclasses.dataclass(frozen=True)
class PhotographsArguments:
    """Print a table of PSNR and SSIM for each set of pictures."""

    natural: tyro.conf.Positional[str]
    """Folder with the folders Set12, BSD68 and CBSD68."""
    models: tuple[str, ...] = ()
    """Runs or model files to measure on the pictures with their channels, instead of the package's models."""
    sets: tuple[str, ...] = tuple(PUBLISHED)
    """Folders to measure on."""
    bm3d: bool = False
    """Also measure BM3D, given the noise level (extra `baselines`)."""
    self_ensemble: bool = False
    """Also measure the mean over the eight flips and turns of each picture."""
    rounded: bool = False
    """Also measure on noisy pictures that are clipped and rounded to 8 bits."""


def measured(functions: Sequence[Denoise | None], images: "Images", config: RunConfig) -> list[str]:
    """Return the PSNR and SSIM of a function for each of SIGMAS, or nothing for None."""
    from dae.analysis.denoisers import Trial, score

    trials = [
        Trial("", function, images, dataclasses.replace(config, noise_level=sigma / 255))
        for function, sigma in zip(functions, SIGMAS, strict=True)
        if function is not None
    ]
    metrics = score(trials)
    cells = [None if function is None else next(metrics) for function in functions]
    return ["" if means is None else f"{means['psnr']:.2f} / {means['ssim']:.3f}" for means in cells]


def denoisers(name: str, model: "keras.Model", arguments: PhotographsArguments) -> Mapping[str, Denoise]:
    """Return the functions to measure a model with, by the titles of their rows."""
    from dae.inference.denoise import Denoiser

    denoiser = Denoiser(model)
    functions: dict[str, Denoise] = {
        f"`{name}`, {model.count_params():,} weights": lambda noisy: denoiser(np.asarray(noisy))
    }
    if arguments.self_ensemble:
        averaged = Denoiser(model, self_ensemble=True)
        functions[f"`{name}` with `--self-ensemble`"] = lambda noisy: averaged(np.asarray(noisy))
    if arguments.rounded:
        functions[f"`{name}`, noisy pictures rounded to 8 bits"] = lambda noisy: denoiser(
            np.rint(255 * np.clip(noisy, 0, 1)) / np.float32(255)
        )
    return functions


def seconds_per_megapixel(denoise: Denoise, channels: int) -> str:
    """Return the median of three times to denoise a picture of 1000 x 1000 pixels, after a first one."""
    pictures = np.random.default_rng(0).random((1, 1000, 1000, channels), np.float32)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        denoise(pictures)
        seconds.append(time.perf_counter() - started)
    return f"{np.median(seconds[1:]):.2f}"


def main() -> None:
    arguments = cli.parse(PhotographsArguments)
    for name in arguments.sets:
        lookup(PUBLISHED, name, "--sets")
        if not Path(arguments.natural, name).is_dir():
            raise UsageError(f"{arguments.natural}: expected a folder {name} in it")
    cli.import_tensorflow()
    from dae import runtime
    from dae.analysis.denoisers import bm3d_for
    from dae.data import datasets
    from dae.inference.denoise import PRETRAINED
    from dae.workdir.model_files import load_model

    runtime.resolve(RunConfig(shards=1))
    paths = [Path(name) for name in arguments.models] or [PRETRAINED / "grey", PRETRAINED / "colour"]
    models = {path.name: load_model(path) for path in paths}
    for folder in arguments.sets:
        config = RunConfig(data=str(Path(arguments.natural, folder)), clip_noise=False)
        images, _ = datasets.load_test(config)
        rows = [["no denoising", *measured([np.asarray] * len(SIGMAS), images, config), ""]]
        for name, model in models.items():
            if model.input_shape[-1] != images.channels:
                continue
            for title, function in denoisers(name, model, arguments).items():
                cells = measured([function] * len(SIGMAS), images, config)
                rows.append([title, *cells, seconds_per_megapixel(function, images.channels)])
        if arguments.bm3d:
            functions = [None, *(bm3d_for(sigma / 255) for sigma in SIGMAS[1:])]
            rows.append(["BM3D, given the level", *measured(functions, images, config), ""])
        rows += [[title, *figures, ""] for title, figures in PUBLISHED[folder].items()]
        print(table([folder, *map(str, SIGMAS), "s per megapixel"], rows), end="\n\n")


if __name__ == "__main__":
    cli.run(main)
