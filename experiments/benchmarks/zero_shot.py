"""Denoise single pictures with and without training: `python experiments/benchmarks/zero_shot.py FOLDER`.

FOLDER contains Set12. The extra `baselines` adds BM3D, which is given the noise level.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tyro
from measure import table
from tqdm import tqdm

from dae import cli
from dae.config import RunConfig, preset
from dae.errors import UsageError

# Of a grey picture, float32 [H, W].
Denoise = Callable[[np.ndarray], np.ndarray]
NOISES = (("gaussian", 25 / 255), ("poisson", 1 / 30))


@dataclasses.dataclass(frozen=True)
class ZeroShotArguments:
    """Print tables of the PSNR of each picture, with noise that is neither clipped nor rounded."""

    natural: tyro.conf.Positional[str]
    """Folder with the folder Set12."""


def after_anscombe(denoise: Callable[[np.ndarray, float], np.ndarray], gain: float) -> Denoise:
    """Return the function that denoises a picture with Poisson noise, after a transform to noise of variance 1.

    Source: Mäkitalo and Foi, A Closed-Form Approximation of the Exact Unbiased Inverse of the Anscombe Variance-
    Stabilizing Transformation (2011). The transformed values are divided by their largest for white.
    """

    def transformed(noisy: np.ndarray) -> np.ndarray:
        white = 2 * np.sqrt(1 / gain + 3 / 8)
        x = white * denoise(2 * np.sqrt(np.maximum(noisy / gain, 0) + 3 / 8) / white, 1 / white)
        root = np.sqrt(3 / 2)
        return gain * (x**2 / 4 + root / (4 * x) - 11 / (8 * x**2) + 5 / 8 * root / x**3 - 1 / 8)

    return transformed


def denoisers(noise: str, level: float) -> Mapping[str, Denoise]:
    """Return the rows of the table for this noise."""
    from dae.inference.denoise import Denoiser
    from dae.inference.zero_shot import ZeroShot

    found: dict[str, Denoise] = {
        "noisy": lambda noisy: noisy,
        "`dae denoise`": Denoiser(),
        "`dae denoise --zero-shot`": ZeroShot(preset("zero_shot")),
    }
    try:
        from bm3d import bm3d
    except ModuleNotFoundError:
        return found
    if noise == "poisson":
        return {**found, "BM3D after the Anscombe transform": after_anscombe(bm3d, level)}
    return {**found, "BM3D": lambda noisy: bm3d(noisy, level)}


def main() -> None:
    arguments = cli.parse(ZeroShotArguments)
    paths = sorted(Path(arguments.natural, "Set12").glob("*.png"))
    if not paths:
        raise UsageError(f"{arguments.natural}: expected a folder Set12 with .png files in it")
    cli.import_tensorflow()
    from dae import runtime
    from dae.data import noise, pictures
    from dae.seeding import stateless_seed

    runtime.resolve(preset("zero_shot"))
    for name, level in NOISES:
        corrupt = noise.corruption(RunConfig(noise=name, noise_level=level, clip_noise=False), level)
        functions = denoisers(name, level)
        rows: dict[str, list[float]] = {title: [] for title in functions}
        for number, path in enumerate(tqdm(paths, desc=name, disable=None)):
            clean = np.float32(pictures.read(path) / 255).squeeze()
            noisy = corrupt(clean[None, :, :, None], level, stateless_seed(0, "noisy pictures", number)).numpy()
            for title, denoise in functions.items():
                error = np.mean((np.clip(denoise(noisy[0, :, :, 0]), 0, 1) - clean) ** 2)
                rows[title].append(-10 * np.log10(error))
        head = [f"{name} {level:.3g}", *(path.stem for path in paths), "mean"]
        print(table(head, [[title, *(f"{x:.2f}" for x in [*row, np.mean(row)])] for title, row in rows.items()]), "\n")


if __name__ == "__main__":
    cli.run(main)
