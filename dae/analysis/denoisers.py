"""Denoisers as named functions from noisy to denoised images, their metrics on images with known noise, and sweeps."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae import plugins
from dae.analysis.report import TITLES, table, write_csv
from dae.config import RunConfig
from dae.data import noise
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import check_fits, compiled_by_shape, make_evaluator
from dae.evaluation.metrics import METRICS
from dae.models.fused_layers import fused
from dae.reporting import plots

# The name of the denoiser that returns its input.
NO_DENOISING = "no denoising"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A denoiser, and the images and the noise to test it with."""

    denoiser: str
    """The name of the denoiser."""
    denoise: Callable[[tf.Tensor], tf.Tensor | np.ndarray]
    """The function from noisy to denoised images, both float32 [N, H, W, C]."""
    images: Images
    config: RunConfig
    """The settings of which noise, noise_level, clip_noise and seed decide the noise."""

    @property
    def level(self) -> float | tuple[float, float]:
        """The noise level, or the lowest and the highest one."""
        low, high = noise.level_range(self.config, self.images.is_noisy)
        return low if low == high else (low, high)


def model_trial(name: str, model: keras.Model, config: RunConfig, images: Images) -> Trial:
    """Return the trial of a model. Raises UsageError if it does not take the images."""
    check_fits(model, images)
    if not images.has_clean:
        raise UsageError(
            f"{name}: the test images have no clean ones to compare with; add --data, or --noisy and --clean"
        )
    return Trial(name, compiled_by_shape(lambda noisy: fused(model, training=False)(noisy).images), images, config)


def bm3d_for(level: float) -> Callable[[Any], np.ndarray]:
    """Return BM3D, with the authors' settings for Gaussian noise of this level, as a function of images [N, H, W, C].

    In colour, it is their form for RGB, which matches blocks by their luminance. Source: the authors' package; Dabov,
    Foi, Katkovnik and Egiazarian, Image Denoising by Sparse 3-D Transform-Domain Collaborative Filtering (2007), with
    the variances of Mäkinen, Azzari and Foi, Collaborative Filtering of Correlated Noise (2020). Raises UsageError if
    the package, which is in the extra `baselines`, is not installed.
    """
    try:
        import bm3d
    except ModuleNotFoundError as error:
        raise UsageError(f"--bm3d: {error.name} is not installed; run: pip install '.[baselines]'") from None

    def denoise(noisy: Any) -> np.ndarray:
        by_channels = {1: bm3d.bm3d, 3: bm3d.bm3d_rgb}[noisy.shape[-1]]
        return np.stack([by_channels(image.squeeze(), level).reshape(image.shape) for image in np.asarray(noisy)])

    return denoise


def score(trials: Iterable[Trial]) -> Iterator[dict[str, float]]:
    """Run each trial and yield the mean of each metric over its images; they are compiled once for all trials."""
    image = keras.Input((None, None, None))
    # The identity, because the batches already hold denoised images.
    evaluate = make_evaluator(keras.Model(image, keras.layers.Activation("linear")(image)), metrics=METRICS)
    for trial in trials:
        batches = evaluation_batches(trial.images, trial.config, "test")
        denoised = (batch._replace(noisy=tf.cast(trial.denoise(batch.noisy), tf.float32)) for batch in batches)
        yield {name.removeprefix("test_"): mean for name, mean in evaluate("test", denoised).items()}


def sweep(trials: Sequence[Trial], noises: Sequence[str], levels: Sequence[float | tuple[float, float]]) -> list[Trial]:
    """Return no denoising of the images of the first trial, and each trial, with each noise model at each level.

    Raises UsageError for an invalid noise or level.
    """
    first = trials[0]
    shape = (*first.images.shapes[0], first.images.channels)
    changes: list[dict[str, Any]] = [
        {"noise": name, "noise_level": level} for name, level in itertools.product(noises, levels)
    ]
    for change in changes:
        changed = dataclasses.replace(first.config, **change)
        noise.check(changed, shape, noise.level_range(changed, first.images.is_paired))
    return [
        dataclasses.replace(trial, config=dataclasses.replace(trial.config, **change))
        for trial in (Trial(NO_DENOISING, lambda noisy: noisy, first.images, first.config), *trials)
        for change in changes
    ]


def save_sweep(path: Path, trials: Sequence[Trial], metrics: Iterable[dict[str, float]]) -> str:
    """Write a PNG of every metric over the level, a CSV file beside it, and return a Markdown table.

    `metrics` are those of each trial, from `score`.
    """
    noises = list(dict.fromkeys(trial.config.noise for trial in trials))
    labels = dict(zip(noises, plugins.unique_names(map(plugins.label, noises)), strict=True))
    rows: list[dict[str, Any]] = [
        {
            "denoiser": trial.denoiser,
            "noise": labels[trial.config.noise],
            "level": " to ".join(map(str, trial.level)) if isinstance(trial.level, tuple) else trial.level,
            "test_images": len(trial.images),
            **means,
        }
        for trial, means in zip(trials, metrics, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), rows)
    panels = list(itertools.product(labels.values(), METRICS))
    figure, axes = plots.panels(len(panels), len(METRICS), (3.2, 2.6))
    for axis, (label, metric) in zip(axes, panels, strict=True):
        for denoiser in dict.fromkeys(trial.denoiser for trial in trials):
            curve = [row for row in rows if (row["noise"], row["denoiser"]) == (label, denoiser)]
            axis.plot([row["level"] for row in curve], [row[metric] for row in curve], ".-", label=denoiser)
        axis.set(title=TITLES[metric], xlabel=f"{label} level")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    plots.save(path, figure)
    return table(sorted(rows, key=lambda row: (row["noise"], row["level"])))
