"""Noise sweeps: several denoisers on several noise models and levels, as tables and a plot."""

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dae import plugins
from dae.config import RunConfig
from dae.data import noise
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.evaluation.evaluate import make_evaluator
from dae.evaluation.metrics import METRICS
from dae.reporting import plots
from dae.workdir.files import atomic_path

T = TypeVar("T")

# Name of the denoiser that returns its input.
BASELINE = "none"
# Titles of the metrics in tables and plots.
TITLES = {name: name for name in METRICS} | {
    "bce": "BCE, nats per pixel",
    "bce_excess": "BCE excess",
    "mse": "MSE",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "accuracy": "accuracy",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The metrics of one denoiser on the test images with one noise."""

    denoiser: str
    noise: str
    level: float | tuple[float, float]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model, the configuration it was trained with, and the images to test it on."""

    name: str
    model: keras.Model
    config: RunConfig
    images: Images


def sweep(
    denoisers: Sequence[Denoiser], noises: Sequence[str], levels: Sequence[float | tuple[float, float]]
) -> Iterator[Result]:
    """Evaluate each denoiser with each noise model at each level, with the seed and the clipping of its configuration.

    The first denoiser's noisy images come first, as the denoiser BASELINE. Each model is compiled once. Raises
    UsageError, before anything is computed, for an invalid noise or level.
    """
    first = denoisers[0]
    image = keras.Input((None, None, first.images.channels))
    identity = keras.Model(image, keras.layers.Activation("linear")(image))
    shape = (*first.images.shapes[0], first.images.channels)
    for name in noises:
        for level in levels:
            noise.check(dataclasses.replace(first.config, noise=name, noise_level=level), shape)
    labels = plugins.unique_names(map(plugins.label, noises))
    for denoiser in (dataclasses.replace(first, name=BASELINE, model=identity), *denoisers):
        # Without the losses that they were trained with, which differ.
        evaluate = make_evaluator(denoiser.model, shards=denoiser.config.shards or 1)
        for name, label in zip(noises, labels, strict=True):
            for level in levels:
                config = dataclasses.replace(denoiser.config, noise=name, noise_level=level)
                means = evaluate(evaluation_batches(denoiser.images, config, "test"))
                yield Result(denoiser.name, label, level, means)


def tables(results: Sequence[Result]) -> str:
    """Return a Markdown table for each metric: a row for each noise and level, a column for each denoiser."""
    denoisers = _without_repeats(result.denoiser for result in results)
    by_cell = {(result.denoiser, result.noise, result.level): result.metrics for result in results}
    lines = []
    for metric, title in TITLES.items():
        lines += [f"| {title} | level | {' | '.join(denoisers)} |", f"| --- | --- |{' --- |' * len(denoisers)}"]
        for noise_name, level in _without_repeats((result.noise, result.level) for result in results):
            values = [by_cell[denoiser, noise_name, level][metric] for denoiser in denoisers]
            cells = " | ".join(f"{value:.2f}" if metric == "psnr" else f"{value:.4f}" for value in values)
            lines.append(f"| {noise_name} | {format_level(level)} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write a row for each result."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["denoiser", "noise", "level", *TITLES])
        for result in results:
            values = [result.metrics[metric] for metric in TITLES]
            writer.writerow([result.denoiser, result.noise, format_level(result.level), *values])


def draw(path: Path, results: Sequence[Result], denoisers: Sequence[Denoiser]) -> None:
    """Write a PNG of every metric over the level, a row for each noise; at one level, a matrix of noises and denoisers.

    The levels that a denoiser was trained with are shaded, or marked by a dotted line, in its colour.
    """
    noises = _without_repeats(result.noise for result in results)
    levels = _without_repeats(result.level for result in results)
    rows = 1 if len(levels) == 1 else len(noises)
    figure = Figure(figsize=(3.2 * len(TITLES), 0.4 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, len(TITLES), squeeze=False)
    for column, (metric, title) in enumerate(TITLES.items()):
        if len(levels) == 1:
            _draw_matrix(axes[0, column], metric, results, noises)
            axes[0, column].set_title(f"{title} (level {format_level(levels[0])})")
            continue
        for row, name in enumerate(noises):
            _draw_curves(axes[row, column], metric, [result for result in results if result.noise == name], denoisers)
            axes[row, column].set(xlabel=f"{name} level", title=title if row == 0 else "")
    if len(levels) > 1:
        axes[0, 0].legend(fontsize="small")
    plots.save(path, figure)


def format_level(level: float | tuple[float, float]) -> str:
    """Return `0.5`, or for a range `0.1 to 0.8`."""
    return f"{level[0]:g} to {level[1]:g}" if isinstance(level, tuple) else f"{level:g}"


def _draw_curves(axis: Axes, metric: str, results: Sequence[Result], denoisers: Sequence[Denoiser]) -> None:
    """Draw one metric over the level of one noise, a curve for each denoiser."""
    colours = {BASELINE: "#999999"} | {denoiser.name: f"C{number}" for number, denoiser in enumerate(denoisers)}
    for name, colour in colours.items():
        own = [result for result in results if result.denoiser == name]
        levels = [np.mean(result.level) for result in own]
        axis.plot(levels, [result.metrics[metric] for result in own], ".-", color=colour, label=name)
    for denoiser in denoisers:
        if plugins.label(denoiser.config.noise) == results[0].noise:
            low, high = denoiser.config.noise_range
            if low < high:
                axis.axvspan(low, high, color=colours[denoiser.name], alpha=0.12, lw=0)
            else:
                axis.axvline(low, color=colours[denoiser.name], ls=":")
    axis.grid(alpha=0.3)


def _draw_matrix(axis: Axes, metric: str, results: Sequence[Result], noises: Sequence[str]) -> None:
    """Draw one metric of every noise (rows) and denoiser (columns)."""
    denoisers = _without_repeats(result.denoiser for result in results)
    values = np.zeros((len(noises), len(denoisers)))
    for result in results:
        values[noises.index(result.noise), denoisers.index(result.denoiser)] = result.metrics[metric]
    axis.imshow(values, cmap="Greys", alpha=0.6, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize="small")
    axis.set_xticks(range(len(denoisers)), denoisers, rotation=30, ha="right", fontsize="small")
    axis.set_yticks(range(len(noises)), noises, fontsize="small")


def _without_repeats(values: Iterable[T]) -> list[T]:
    """Return each value once, in the order of first occurrence."""
    return list(dict.fromkeys(values))
