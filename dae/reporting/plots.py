"""Plots and grids of images, drawn by matplotlib and written as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D

from dae.evaluation.evaluate import Samples
from dae.evaluation.metrics import psnr, ssim
from dae.workdir.files import atomic_path


def save_denoised(path: Path, samples: Samples) -> None:
    """Write a PNG with a column for each image and the rows noisy, denoised, clean and error, |denoised - clean|.

    An error of 1 is white. PSNR in dB and SSIM stand below the noisy and the denoised images.
    """
    rows = samples._asdict() | {"error": np.abs(samples.denoised - samples.clean)}
    figure = Figure(figsize=(1.1 * len(samples.clean), 5.2), layout="constrained")
    for axes, images in zip(_draw_rows(figure, rows), (samples.noisy, samples.denoised), strict=False):
        quality = zip(psnr(samples.clean, images).numpy(), ssim(samples.clean, images).numpy(), strict=True)
        for axis, (psnr_value, ssim_value) in zip(axes, quality, strict=True):
            axis.set_xlabel(f"{psnr_value:.1f} dB\nSSIM {ssim_value:.2f}", fontsize=8)
    save(path, figure)


# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles do so in print.
CURVES: dict[str, tuple[str, Literal["-", "--"]]] = {"train": ("#0072b2", "-"), "validation": ("#d55e00", "--")}


def save_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], kept_epoch: int) -> None:
    """Write a PNG with a panel for each tag, with a curve over the epochs for each of `train` and `validation`.

    A vertical line marks the epoch whose model was kept.
    """
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (tag, runs) in zip(axes, curves.items(), strict=False):
        for run, values in runs.items():
            color, style = CURVES[run]
            marker = "o" if len(values) == 1 else None
            axis.plot(range(1, len(values) + 1), values, style, color=color, marker=marker, markersize=4, label=run)
        axis.axvline(kept_epoch, color="#999999", linewidth=1, linestyle=":")
        axis.set_title(tag, fontsize="medium")
        axis.set_xlabel("epoch", fontsize="small")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], color=color, linestyle=style, label=run) for run, (color, style) in CURVES.items()]
    handles.append(Line2D([], [], color="#999999", linewidth=1, linestyle=":", label=f"epoch {kept_epoch}, kept"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save(path, figure)


def save_grid(path: Path, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> None:
    """Write a PNG of named rows of images, each float32 [H, W, C] in [0, 1], with `titles` above the columns."""
    figure = Figure(figsize=(1.1 * len(next(iter(rows.values()))), 3.5 / 3 * len(rows)), layout="constrained")
    _draw_rows(figure, rows, titles)
    save(path, figure)


def save_comparison(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    rows: Mapping[str, np.ndarray],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    metric: str,
) -> None:
    """Write a PNG with a panel of (mean, low, high) for each loss, and below the panels a row of images for each name.

    Each of `rows` is float32 [N, H, W, C] in [0, 1], with the same N. `curves` are learning rates and the `metric` at
    each, by name; they have a panel if there are any.
    """
    columns = 4
    lines = -(-(len(panels) + bool(curves)) // columns)
    count = len(next(iter(panels.values())))
    heights = lines * (0.8 + 0.25 * count), 1.1 * max(1, len(rows))
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = upper.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axis, (name, losses) in zip(axes, panels.items(), strict=False):
        for place, (mean, low, high) in enumerate(losses.values()):
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072b2", capsize=3)
        axis.set(title=name, yticks=range(count), yticklabels=list(losses), ylim=(count - 0.5, -0.5))
        axis.tick_params(axis="x", labelsize="small")
        axis.grid(axis="x", alpha=0.3)
    if curves:
        axis = upper.axes[len(panels)]
        axis.remove()
        axis = upper.add_subplot(lines, columns, len(panels) + 1)  # without the shared y axis
        for name, (rates, values) in curves.items():
            axis.plot(rates, values, ".-", label=name)
        axis.set(title=f"tuning: {metric} by learning rate", xscale="log")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    for axis in upper.axes[len(panels) + bool(curves) :]:
        axis.remove()
    if rows:
        _draw_rows(lower, rows)
    save(path, figure)


def _draw_rows(figure: FigureBase, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> np.ndarray:
    """Draw a row of images for each name, with the name on its left and `titles` above the columns; return the axes."""
    axes = figure.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize="medium")
    return axes


def save(path: Path, figure: Figure) -> None:
    """Write `figure` as a PNG."""
    with atomic_path(path) as temporary:
        # Without metadata the same plot is the same bytes.
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
