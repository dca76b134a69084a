"""Pictures made with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from dae.run_directory import replacing


def save_denoised(path: Path, noisy: np.ndarray, denoised: np.ndarray, clean: np.ndarray) -> None:
    """Writes a PNG with a column for each image and the rows noisy, denoised, clean.

    Each argument is float32 [N, H, W, C] in [0, 1] with C 1 (shown in grey) or 3.
    """
    save_grid(path, {"noisy": noisy, "denoised": denoised, "clean": clean})


def save_grid(path: Path, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> None:
    """Writes a PNG of named rows of images, each float32 [H, W, C] in [0, 1], with `titles` over the columns."""
    figure = Figure(figsize=(1.1 * len(next(iter(rows.values()))), 3.5 / 3 * len(rows)), layout="constrained")
    _draw_rows(figure, rows, titles)
    _save(path, figure)


def save_comparison(
    path: Path, panels: Mapping[str, Mapping[str, tuple[float, float, float]]], rows: Mapping[str, np.ndarray]
) -> None:
    """Writes a PNG: for each panel (mean, low, high) of each loss, and below these a row of images for each name.

    `rows` are float32 [N, H, W, C] in [0, 1], as many in each.
    """
    columns = 4
    lines = -(-len(panels) // columns)
    count = len(next(iter(panels.values())))
    heights = lines * (0.8 + 0.25 * count), 1.1 * len(rows)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = upper.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axis, (name, losses) in zip(axes, panels.items(), strict=False):
        for place, (mean, low, high) in enumerate(losses.values()):
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072b2", capsize=3)
        axis.set(title=name, yticks=range(count), yticklabels=list(losses), ylim=(count - 0.5, -0.5))
        axis.tick_params(axis="x", labelsize="small")
        axis.grid(axis="x", alpha=0.3)
    _draw_rows(lower, rows)
    _save(path, figure)


def _draw_rows(figure: FigureBase, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> None:
    """A row of pictures for each name, which stands at its left, with `titles` over the columns."""
    axes = figure.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize="medium")


def _save(path: Path, figure: Figure) -> None:
    with replacing(path) as temporary:
        # No metadata: the same images give the same bytes.
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
