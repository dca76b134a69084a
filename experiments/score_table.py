"""Measure denoisers on the same noisy digits: `python experiments/score_table.py`; `--help` lists the flags.

Classical filters are made for noise of mean 0, but clipped noise brightens black and darkens white. So each is tuned
on validation images, and followed by `gain * denoised + offset`, fitted to these by least squares, and by clipping.
"""

import dataclasses
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dae import cli
from dae.config import PRESETS, RunConfig, preset
from dae.errors import UsageError, lookup

Denoise = Callable[[Any], np.ndarray]
# The metrics of the table.
COLUMNS = ("bce", "psnr", "ssim")


@dataclasses.dataclass(frozen=True)
class ScoreTableArguments:
    """Train presets, and compare them with tuned classical filters and the posterior mean; repeat it to resume.

    The noise is Gaussian with standard deviation 0.5, clipped to [0, 1].
    """

    presets: tuple[str, ...] = ("fast", "default", "good")
    """Presets to train, in OUTPUT/PRESET/seed-N."""
    seeds: int = 3
    """Number of runs per preset, with the seeds 0, 1, ..."""
    tune_examples: int = 50
    """Validation images that the filters are tuned on."""
    classical_examples: int = 500
    """Test images for the filters and the posterior mean; a multiple of 500, the batch size, so that they have the same
    noise as for the networks."""
    output: str = "runs/score_table"
    """Folder of the runs."""


def candidates(level: float) -> dict[str, list[Denoise]]:
    """Return filters of images [H, W], with the parameters to choose from, for noise of this level."""
    import bm3d
    from scipy import ndimage
    from skimage import restoration

    variation = functools.partial(restoration.denoise_tv_chambolle, eps=1e-5, max_num_iter=1000)
    means = functools.partial(restoration.denoise_nl_means, sigma=0.6 * level)
    patches = itertools.product((0.22, 0.28), (3, 5, 7), (5, 9, 11))
    return {
        "median": [functools.partial(ndimage.median_filter, size=size) for size in (3, 5, 7)],
        "total variation": [functools.partial(variation, weight=weight * level) for weight in (0.4, 0.46, 0.53, 0.61)],
        "non-local means": [
            functools.partial(means, h=strength * level, patch_size=size, patch_distance=distance)
            for strength, size, distance in patches
        ],
        "BM3D": [functools.partial(bm3d.bm3d, sigma_psd=sigma * level) for sigma in (0.49, 0.53, 0.57, 0.61)],
    }


def mean_psnr(clean: np.ndarray, denoised: np.ndarray) -> float:
    """Return the mean over images [N, H, W] of -10 log10(MSE), in dB."""
    return float(np.mean(-10 * np.log10(np.mean((clean - denoised) ** 2, axis=(1, 2)))))


def tuned(filters: list[Denoise], noisy: np.ndarray, clean: np.ndarray) -> Denoise:
    """Return the filter with the highest mean PSNR on images [N, H, W], corrected, for images [N, H, W, 1]."""

    def corrected(images: Any, function: Denoise, gain: float, offset: float) -> np.ndarray:
        filtered = np.stack([function(image) for image in np.asarray(images)[..., 0]])
        return np.clip(gain * filtered + offset, 0, 1)[..., np.newaxis].astype(np.float32)

    found = []
    for function in filters:
        gain, offset = np.polyfit(np.stack([function(image) for image in noisy]).ravel(), clean.ravel(), 1)
        found.append(functools.partial(corrected, function=function, gain=gain, offset=offset))
    return max(found, key=lambda denoise: mean_psnr(clean, denoise(noisy[..., np.newaxis])[..., 0]))


def posterior_mean(images: np.ndarray, level: float) -> Denoise:
    """Return the denoiser E[x | y] for clipped Gaussian noise, if each of the images is as likely to be the clean one.

    E[x | y] = sum_i p(y | x_i) x_i / sum_i p(y | x_i). A pixel of y is 0 with probability Phi(-x / s) and 1 with
    probability Phi((x - 1) / s), where s is the level and Phi the standard normal distribution; in between its density
    is that of N(x, s^2). No denoiser has a lower mean squared error on noisy copies of `images`, in [0, 1].
    """
    from scipy import special

    x = images.reshape(len(images), -1)
    # For 0 < y < 1, log p(y | x) is (y x - x^2 / 2) / s^2, up to a constant that depends on y alone.
    tables = special.log_ndtr(-x / level), special.log_ndtr((x - 1) / level), x / level**2, -(x**2) / (2 * level**2)

    def denoise(noisy: Any) -> np.ndarray:
        y = np.asarray(noisy).reshape(len(noisy), -1)
        inside = (y > 0) & (y < 1)
        factors = (y == 0, y == 1, inside * y, inside)
        logits = sum(factor.astype(np.float32) @ table.T for factor, table in zip(factors, tables, strict=True))
        return (special.softmax(logits, axis=1) @ x).reshape(noisy.shape)

    return denoise


def main() -> None:
    arguments = cli.parse(ScoreTableArguments)
    for name in arguments.presets:
        lookup(PRESETS, name, "--presets")
    os.environ.pop("TF_CONFIG", None)  # each run has this process alone
    cli.import_tensorflow()
    from dae.analysis.denoisers import NO_DENOISING, Trial, model_trial, score
    from dae.data import datasets
    from dae.data.pipeline import evaluation_batches
    from dae.training.trainer import train
    from dae.workdir.model_files import load_model
    from dae.workdir.workdir import read_metrics

    config, level = RunConfig(noise_level=0.5), 0.5
    try:
        filters = candidates(level)
        from dae.analysis.report import table
        from dae.analysis.statistics import interval
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; needed here: pip install '.[baselines]'") from None
    runs = {
        (name, seed): Path(arguments.output, name, f"seed-{seed}")
        for name, seed in itertools.product(arguments.presets, range(arguments.seeds))
    }
    for (name, seed), folder in runs.items():
        train(preset(name, seed=seed), folder, resume=True, quiet=True)
    data = datasets.load(config)
    batches = list(evaluation_batches(data.validation[: arguments.tune_examples], config, "validation"))
    noisy, clean = (np.concatenate([getattr(batch, kind) for batch in batches])[..., 0] for kind in ("noisy", "clean"))
    few = data.test[: arguments.classical_examples]
    trials = [Trial(NO_DENOISING, lambda noisy: noisy, data.test, config)]
    trials += [Trial(name, tuned(functions, noisy, clean), few, config) for name, functions in filters.items()]
    trials.append(Trial("posterior mean", posterior_mean(data.train.pixels / np.float32(255), level), few, config))
    durations: dict[str, list[float]] = {}
    for (name, seed), folder in runs.items():
        title = f"`--preset {name}`"
        durations.setdefault(title, []).append(sum(line["seconds"] for line in read_metrics(folder)) / 60)
        trials.append(model_trial(title, load_model(folder), dataclasses.replace(config, seed=seed), data.test))
    means: dict[tuple[str, int], list[dict[str, float]]] = {}
    for trial, metrics in zip(trials, tqdm(score(trials), total=len(trials), disable=None), strict=True):
        means.setdefault((trial.denoiser, len(trial.images)), []).append(metrics)
    rows = [
        {
            "denoiser": name,
            "minutes of training": f"{statistics.mean(durations[name]):.1f}" if name in durations else "",
            "test images": f"{count:,}",
            **{metric: interval([seed[metric] for seed in seeds]) for metric in COLUMNS},
        }
        for (name, count), seeds in sorted(means.items(), key=lambda item: item[1][0]["psnr"])
    ]
    print(table(rows))


if __name__ == "__main__":
    cli.run(main)
