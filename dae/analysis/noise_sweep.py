"""Several denoisers on several noise models and levels: figures, tables and a plot."""

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dae import plugins
from dae.config import RunConfig
from dae.data import noise
from dae.data.pipeline import evaluation_batches
from dae.evaluation import metrics
from dae.reporting import plots
from dae.workdir.workdir import replacing

# Of the noisy images themselves.
BASELINE = "none"
# How a metric is called on an axis or over a table.
TITLES = {name: name for name in metrics.METRICS} | {
    "bce": "BCE, nats per pixel",
    "bce_excess": "BCE over its floor",
    "mse": "MSE",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "accuracy": "accuracy",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one denoiser, or none, does to the test images under one noise."""

    denoiser: str
    noise: str
    level: float | tuple[float, float]
    figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A denoiser, what it was trained with, and the images to test it on, uint8 [N, H, W, C]."""

    name: str
    model: keras.Model
    config: RunConfig
    images: np.ndarray


def sweep(
    contenders: Sequence[Contender], noises: Sequence[str], levels: Sequence[float | tuple[float, float]]
) -> Iterator[Result]:
    """Each contender on each noise model at each level, drawn by its own seed and clipped as its own config says.

    The noisy images of the first go before, as the denoiser BASELINE. Each model is compiled once for all. Raises
    UsageError, before anything is computed, for a noise or level that cannot be.
    """
    first = contenders[0]
    image = keras.Input(first.images.shape[1:])
    unchanged = keras.Model(image, keras.layers.Activation("linear")(image))
    for name in noises:
        for level in levels:
            noise.check(dataclasses.replace(first.config, noise=name, noise_level=level), first.images.shape[1:])
    labels = plugins.distinct(map(plugins.label, noises))
    for contender in (dataclasses.replace(first, name=BASELINE, model=unchanged), *contenders):
        # Not the loss that each was trained with, which is no common measure.
        evaluate = metrics.evaluator(contender.model, None, contender.config.micro_batches or 1)
        for name, label in zip(noises, labels, strict=True):
            for level in levels:
                config = dataclasses.replace(contender.config, noise=name, noise_level=level)
                means = evaluate(evaluation_batches(contender.images, config, "test"))
                yield Result(contender.name, label, level, {metric: means[metric] for metric in metrics.METRICS})


def tables(results: Sequence[Result]) -> str:
    """A Markdown table for each metric: a row for each noise and level, a column for each denoiser."""
    denoisers = _distinct(result.denoiser for result in results)
    by_place = {(result.denoiser, result.noise, result.level): result.figures for result in results}
    lines = []
    for metric, title in TITLES.items():
        lines += [f"| {title} | level | {' | '.join(denoisers)} |", f"| --- | --- |{' --- |' * len(denoisers)}"]
        for noise_name, level in _distinct((result.noise, result.level) for result in results):
            values = [by_place[denoiser, noise_name, level][metric] for denoiser in denoisers]
            cells = " | ".join(f"{value:.2f}" if metric == "psnr" else f"{value:.4f}" for value in values)
            lines.append(f"| {noise_name} | {level_in_words(level)} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Writes one row for each result."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["denoiser", "noise", "level", *TITLES])
        for result in results:
            figures = [result.figures[metric] for metric in TITLES]
            writer.writerow([result.denoiser, result.noise, level_in_words(result.level), *figures])


def draw(path: Path, results: Sequence[Result], contenders: Sequence[Contender]) -> None:
    """Writes a PNG: every metric against the level, a row for each noise; at one level, noises against denoisers.

    The levels that a contender was trained with are shaded, or marked by a dotted line, in its colour.
    """
    noises = _distinct(result.noise for result in results)
    levels = _distinct(result.level for result in results)
    rows = 1 if len(levels) == 1 else len(noises)
    figure = Figure(figsize=(3.2 * len(TITLES), 0.4 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, len(TITLES), squeeze=False)
    for column, (metric, title) in enumerate(TITLES.items()):
        if len(levels) == 1:
            _matrix(axes[0, column], metric, results, noises)
            axes[0, column].set_title(f"{title} (level {level_in_words(levels[0])})")
            continue
        for row, name in enumerate(noises):
            _curves(axes[row, column], metric, [result for result in results if result.noise == name], contenders)
            axes[row, column].set(xlabel=f"{name} level", title=title if row == 0 else "")
    if len(levels) > 1:
        axes[0, 0].legend(fontsize="small")
    plots.save(path, figure)


def level_in_words(level: float | tuple[float, float]) -> str:
    """`0.5`, or of a range `0.1 to 0.8`."""
    return f"{level[0]:g} to {level[1]:g}" if isinstance(level, tuple) else f"{level:g}"


def _curves(axis: Axes, metric: str, results: Sequence[Result], contenders: Sequence[Contender]) -> None:
    """One metric against the level of one noise, a curve for each denoiser."""
    colours = {BASELINE: "#999999"} | {contender.name: f"C{number}" for number, contender in enumerate(contenders)}
    for name in _distinct(result.denoiser for result in results):
        colour = colours[name]
        own = [result for result in results if result.denoiser == name]
        axis.plot(
            [np.mean(result.level) for result in own],
            [result.figures[metric] for result in own],
            ".-",
            color=colour,
            label=name,
        )
        for contender in contenders:
            if contender.name == name and plugins.label(contender.config.noise) == results[0].noise:
                low, high = contender.config.noise_range
                if low < high:
                    axis.axvspan(low, high, color=colour, alpha=0.12, lw=0)
                else:
                    axis.axvline(low, color=colour, ls=":")
    axis.grid(alpha=0.3)


def _matrix(axis: Axes, metric: str, results: Sequence[Result], noises: Sequence[str]) -> None:
    """One metric of every noise (down) and denoiser (across)."""
    denoisers = _distinct(result.denoiser for result in results)
    values = np.zeros((len(noises), len(denoisers)))
    for result in results:
        values[noises.index(result.noise), denoisers.index(result.denoiser)] = result.figures[metric]
    axis.imshow(values, cmap="Greys", alpha=0.6, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize="small")
    axis.set_xticks(range(len(denoisers)), denoisers, rotation=30, ha="right", fontsize="small")
    axis.set_yticks(range(len(noises)), noises, fontsize="small")


def _distinct(values) -> list:
    """The values, each once, in the order in which they first came."""
    return list(dict.fromkeys(values))
