"""Denoisers as named functions from noisy to denoised images, their scores on images with known noise, and sweeps."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae import plugins
from dae.analysis.report import TITLES, Interval, Row, cell, interval, table, write_csv
from dae.config import RunConfig
from dae.data import noise
from dae.data.images import Images
from dae.data.pipeline import Batch, evaluation_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import Evaluate, check_fits, compiled_by_shape, make_evaluator
from dae.evaluation.metrics import METRICS
from dae.losses.composite import ImageFunction
from dae.models.fused_layers import fused
from dae.reporting import plots

# The name of the denoiser that returns its input.
NO_DENOISING = "no denoising"
# Number of denoised images that a score keeps for plots.
SAMPLES = 10


@dataclasses.dataclass(frozen=True)
class Trial:
    """A denoiser, and the images and the noise to test it with."""

    denoiser: str
    """The name of the denoiser; networks that differ only in their seeds share it."""
    denoise: Callable[[tf.Tensor], tf.Tensor | np.ndarray]
    """The function from noisy to denoised images, both float32 [N, H, W, C]."""
    images: Images
    config: RunConfig
    """The settings of which noise, noise_level, clip_noise and seed decide the noise."""
    milliseconds: float | None = None
    """The time per image, if it is known (default: it is measured)."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Additional columns of a table, by name."""

    @property
    def level(self) -> float | tuple[float, float]:
        """The noise level, or the lowest and the highest one."""
        low, high = noise.level_range(self.config, self.images.is_noisy)
        return low if low == high else (low, high)


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of a trial."""

    trial: Trial
    metrics: dict[str, float]
    """The mean of each metric over the images."""
    milliseconds: float
    """The time per image: the median over batches."""
    samples: np.ndarray
    """The first SAMPLES denoised images of the first batch."""


def no_denoising(images: Images, config: RunConfig) -> Trial:
    """Return the trial that scores the noisy images as they are."""
    return Trial(NO_DENOISING, lambda noisy: noisy, images, config, milliseconds=0.0)


def network(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return `model` as a function of noisy images, compiled for each of their shapes."""
    return compiled_by_shape(lambda noisy: fused(model, training=False)(noisy).images)


def model_trial(name: str, model: keras.Model, config: RunConfig, images: Images) -> Trial:
    """Return the trial of a model. Raises UsageError if it does not take the images."""
    check_fits(model, images)
    if not images.has_clean:
        raise UsageError(
            f"{name}: the test images have no clean ones to compare with; add --data, or --noisy and --clean"
        )
    return Trial(name, network(model), images, config, facts={"weights": model.count_params()})


def score(trials: Iterable[Trial], metrics: Mapping[str, ImageFunction] = METRICS) -> Iterator[Score]:
    """Run each trial and yield its score; the metrics are compiled once for all trials."""
    image = keras.Input((None, None, None))
    # The identity, because the batches already hold denoised images.
    unchanged = keras.Model(image, keras.layers.Activation("linear")(image))
    evaluate = make_evaluator(unchanged, metrics=metrics)
    for trial in trials:
        yield _score(trial, evaluate)


def _score(trial: Trial, evaluate: Evaluate) -> Score:
    milliseconds: list[float] = []
    samples: list[np.ndarray] = []

    def denoised_batches() -> Iterator[Batch]:
        for batch in evaluation_batches(trial.images, trial.config, "test"):
            if not milliseconds and trial.milliseconds is None:
                trial.denoise(batch.noisy)  # the first call may compile
            started = time.perf_counter()
            denoised = tf.convert_to_tensor(trial.denoise(batch.noisy), tf.float32)
            milliseconds.append(1000 * (time.perf_counter() - started) / len(denoised))
            samples.append(denoised[:SAMPLES].numpy())
            yield batch._replace(noisy=denoised)

    means = {name.removeprefix("test_"): mean for name, mean in evaluate("test", denoised_batches()).items()}
    median = float(np.median(milliseconds)) if trial.milliseconds is None else trial.milliseconds
    return Score(trial, means, median, samples[0])


def rows(scores: Iterable[Score]) -> list[Row]:
    """Return a row for each denoiser and noise, with each metric as an interval over seeds."""
    groups: dict[tuple, list[Score]] = {}
    for result in scores:
        trial = result.trial
        groups.setdefault((trial.denoiser, trial.config.noise, trial.level), []).append(result)
    noises = list(dict.fromkeys(name for _, name, _ in groups))
    labels = dict(zip(noises, plugins.unique_names(map(plugins.label, noises)), strict=True))
    return [
        {
            "denoiser": denoiser,
            "noise": labels[noise_model],
            "level": " to ".join(map(str, level)) if isinstance(level, tuple) else level,
            "test_images": len(group[0].trial.images),
            "seeds": len(group),
            **{metric: interval([result.metrics[metric] for result in group]) for metric in group[0].metrics},
            "milliseconds_per_image": group[0].milliseconds,
            **group[0].trial.facts,
        }
        for (denoiser, noise_model, level), group in groups.items()
    ]


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
        for trial in (no_denoising(first.images, first.config), *trials)
        for change in changes
    ]


def save_sweep(path: Path, scores: Iterable[Score]) -> str:
    """Write a PNG of every metric over the level, a CSV file beside it, and return Markdown tables."""
    scored = rows(scores)
    write_csv(path.with_suffix(".csv"), scored)
    panels = list(itertools.product(dict.fromkeys(row["noise"] for row in scored), METRICS))
    figure, axes = plots.panels(len(panels), len(METRICS), (3.2, 2.6))
    for axis, (noise_name, metric) in zip(axes, panels, strict=True):
        curves: dict[str, dict[Any, Interval]] = {}
        for row in scored:
            if row["noise"] == noise_name:
                curves.setdefault(row["denoiser"], {})[row["level"]] = row[metric]
        for number, (name, curve) in enumerate(curves.items()):
            means, low, high = zip(*curve.values(), strict=True)
            axis.plot(list(curve), means, ".-", color=f"C{number}", label=name)
            axis.fill_between(list(curve), low, high, color=f"C{number}", alpha=0.2, lw=0)
        axis.set(title=TITLES[metric], xlabel=f"{noise_name} level")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    plots.save(path, figure)
    tables = ""
    for metric in METRICS:  # a line for each noise and level, with a column for each denoiser
        lines: dict[tuple, dict[str, Any]] = {}
        for row in scored:
            key = row["noise"], row["level"]
            lines.setdefault(key, {TITLES[metric]: key[0], "level": key[1]})[row["denoiser"]] = cell(row, metric)
        tables += table(list(lines.values()))
    return tables
