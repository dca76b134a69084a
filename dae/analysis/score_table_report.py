"""The report of a score table: Markdown with the protocol, CSV files and pictures."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from dae.analysis.noise_sweep import TITLES, format_level
from dae.analysis.score_table import COLUMNS, NO_DENOISING, SHOWN, TIMED_BATCH, LevelResult, Row, noisy_and_clean
from dae.analysis.statistics import LEVEL, Estimate
from dae.config import RunConfig
from dae.data.datasets import Splits
from dae.losses.ssim import SIGMA, WINDOW
from dae.reporting import plots
from dae.runtime import cores
from dae.workdir.environment import environment
from dae.workdir.files import atomic_path, atomic_write
from dae.workdir.workdir import read_environment


def save(
    folder: Path,
    rows: Sequence[Row],
    config: RunConfig,
    data: Splits,
    runs: Sequence[Path],
    tuned_on: int,
    levels: Sequence[LevelResult] = (),
) -> str:
    """Write score_table.md, .csv and .png and, with `levels`, noise_levels.csv and .png; return the Markdown.

    Rows are sorted by PSNR, the best last. `runs` are the folders of all trained runs, and `tuned_on` is how many
    validation images the filters were tuned on, or 0 if there are none.
    """
    rows = sorted(rows, key=lambda row: row.estimate("psnr").mean)
    text = _markdown(rows, config, data, runs, tuned_on, levels)
    atomic_write(folder / "score_table.md", text)
    _write_csv(folder / "score_table.csv", [_csv_row(row) for row in rows])
    _, clean = noisy_and_clean(data.test, config, "test", SHOWN)
    first = next(row for row in rows if row.name == NO_DENOISING)
    pictures = {f"noisy\n{first.estimate('psnr').mean:.2f} dB": first.shown, "clean": clean}
    pictures |= {
        f"{row.name}\n{row.estimate('psnr').mean:.2f} dB": row.shown for row in rows if row.name != NO_DENOISING
    }
    plots.save_grid(folder / "score_table.png", pictures)
    if levels:
        common = [{"denoiser": one.denoiser, "level": one.level, "test_images": one.images} for one in levels]
        psnr = [_csv_values("psnr", one.psnr) | {"details": one.details} for one in levels]
        _write_csv(folder / "noise_levels.csv", [a | b for a, b in zip(common, psnr, strict=True)])
        _draw_levels(folder / "noise_levels.png", levels)
    return text


def _csv_row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"denoiser": row.name, "test_images": row.images, "seeds": len(row.metrics[COLUMNS[0]])}
    for metric in COLUMNS:
        values |= _csv_values(metric, row.estimate(metric))
    return values | {
        "weights": row.weights,
        "seconds_to_train": float(np.mean(row.seconds)) if row.seconds else None,
        "milliseconds_per_image": row.milliseconds,
        "details": row.details.replace("`", ""),
    }


def _csv_values(name: str, one: Estimate) -> dict[str, float | None]:
    values = {name: one.mean, f"{name}_low": one.low, f"{name}_high": one.high}
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _markdown(
    rows: Sequence[Row],
    config: RunConfig,
    data: Splits,
    runs: Sequence[Path],
    tuned_on: int,
    levels: Sequence[LevelResult],
) -> str:
    level = f"Gaussian noise of standard deviation {format_level(config.noise_range[0])}, clipped to [0, 1]"
    lines = [f"# Denoising {config.dataset}: {level}", ""]
    head = ["denoiser", "test images", *(TITLES[metric] for metric in COLUMNS), "weights", "s to train", "ms per image"]
    lines += _table(head, map(_cells, rows))
    lines += [*(f"- {row.name}: {row.details}." for row in rows if row.details), ""]
    lines += ["## Protocol", "", *(f"- {line}" for line in _protocol(config, data, runs, tuned_on)), ""]
    if levels:
        networks = {row.name for row in rows if row.weights is not None}
        lines += ["## Noise levels", "", *_levels_markdown(levels, networks)]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.images:,}",
        *(_cell(row.estimate(metric), ".2f" if metric == "psnr" else ".4f") for metric in COLUMNS),
        "" if row.weights is None else f"{row.weights:,}",
        f"{np.mean(row.seconds):.0f}" if row.seconds else "",
        "" if row.milliseconds is None else f"{row.milliseconds:.3g}",
    ]


def _cell(one: Estimate, form: str) -> str:
    if math.isnan(one.mean):
        return ""
    return f"{one.mean:{form}}" + ("" if math.isnan(one.low) else f" [{one.low:{form}}, {one.high:{form}}]")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _protocol(config: RunConfig, data: Splits, runs: Sequence[Path], tuned_on: int) -> list[str]:
    """Return, one per line, the rules by which the table was made."""
    machine = environment()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores()
    machines = {(each["cpu"], each["cpu_cores"]) for each in map(read_environment, runs)}
    trained_on = "; ".join(f"{cpu}, {count} core{'s' if count > 1 else ''}" for cpu, count in sorted(machines))
    versions = machine["versions"] | {name: version(name) for name in ("scipy", "scikit-image", "PyWavelets", "bm3d")}
    filters = [
        f"Filters were tuned for the best mean PSNR on {tuned_on:,} validation images. They assume noise of mean 0, "
        "but clipped noise brightens black and darkens white. So the output of each is multiplied by a gain and added "
        "to an offset, fitted to the same images by least squares, and clipped to [0, 1]."
    ]
    height, width, channels = data.train.image_shape
    return [
        f"Images: {config.dataset}, {height} x {width} x {channels}, from 0 (black) to 1 (white): "
        f"{len(data.train):,} to train on, unless noted, the last {len(data.validation):,} training images to validate "
        f"on, and {len(data.test):,} to test on.",
        f"Noise: clip(x + {format_level(config.noise_range[0])} n, 0, 1), n standard normal and independent for each "
        "value. Every row has the same noise, that of seed 0, except that the noise of a run is that of its seed.",
        "Metrics are computed for each test image and then averaged, without rounding to 256 levels. PSNR is -10 "
        f"log10(MSE); SSIM has a Gaussian window of {WINDOW} x {WINDOW} pixels, sigma {SIGMA}, within the image, and "
        "constants 0.01^2 and 0.03^2; BCE clips outputs to [1e-7, 1 - 1e-7], and its excess is that above its lowest "
        "possible value.",
        f"Several seeds: the mean and, in brackets, its {LEVEL:.0%} t-interval; of seconds, the mean.",
        "No test image was used to choose anything. A run keeps the epoch with the lowest validation loss, if it has "
        "validation images.",
        *(filters if tuned_on else []),
        f"Milliseconds per image: {machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}; filters take one "
        f"image at a time, the others {TIMED_BATCH}; the median, after one batch for warm-up.",
        *([f"Seconds to train, with validation and checkpoints: {trained_on}."] if runs else []),
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}.",
    ]


def _levels_markdown(levels: Sequence[LevelResult], networks: Set[str]) -> list[str]:
    columns = list(dict.fromkeys(one.level for one in levels))
    names = list(dict.fromkeys(one.denoiser for one in levels))
    images = {one.denoiser: one.images for one in levels}
    by_cell = {(one.denoiser, one.level): _cell(one.psnr, ".2f") for one in levels}
    rows = [[name, f"{images[name]:,}", *(by_cell[name, level] for level in columns)] for name in names]
    head = ["PSNR, dB, at level", "test images", *map(format_level, columns)]
    trained = "each run is one network for all levels" if networks & set(names) else "no run was trained for a range"
    return [
        "The filter that is best on validation images was tuned anew at each level, and the posterior mean knows the "
        f"level; {trained}.",
        "",
        *_table(head, rows),
    ]


def _draw_levels(path: Path, levels: Sequence[LevelResult]) -> None:
    """Write a PNG of PSNR over the noise level, a curve for each denoiser, with its interval shaded."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(dict.fromkeys(one.denoiser for one in levels)):
        own = [one for one in levels if one.denoiser == name]
        places, colour = [one.level for one in own], "#999999" if name == NO_DENOISING else f"C{number}"
        axis.plot(places, [one.psnr.mean for one in own], ".-", color=colour, label=name)
        axis.fill_between(
            places, [one.psnr.low for one in own], [one.psnr.high for one in own], color=colour, alpha=0.2
        )
    axis.set(xlabel="standard deviation of the noise, before clipping", ylabel=TITLES["psnr"])
    axis.legend()
    axis.grid(alpha=0.3)
    plots.save(path, figure)
