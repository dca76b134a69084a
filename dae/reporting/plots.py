"""Plots and grids of images, drawn by matplotlib and written as PNG."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import evaluation_batch_size, evaluation_batches
from dae.evaluation.metrics import psnr, ssim
from dae.files import atomic_path

# The images of a split that `save_denoised` shows, and the most pixels of a side and of a row of images.
SHOWN, SHOWN_SIDE, SHOWN_WIDTH = 10, 512, 2048


def save_denoised(path: Path, images: Images, config: RunConfig, denoise: Callable[[tf.Tensor], Any]) -> None:
    """Write a PNG with a column for each image and the rows noisy, denoised, clean and error, |denoised - clean|.

    It shows the first test images, whole, as many as fit side by side, up to SHOWN; of large ones, only every n-th
    pixel is drawn. `denoise` maps noisy to denoised images [1, H, W, C]. An error of 1 is white. PSNR in dB and SSIM
    stand below the noisy and the denoised images. Without clean images, the rows are noisy, denoised and residual,
    noisy - denoised, where 0 is grey.
    """
    side = int(images.shapes[:SHOWN].max())
    every, drawn = -(-side // SHOWN_SIDE), min(side, SHOWN_SIDE)
    rows: dict[str, list[np.ndarray]] = {"noisy": [], "denoised": []}
    rows |= {"clean": [], "error": []} if images.has_clean else {"residual": []}
    labels = []
    evaluated = evaluation_batches(images[: max(SHOWN, evaluation_batch_size(images, config))], config, "test")
    singles = (batch.images(index, index + 1) for batch in evaluated for index in range(batch.clean.shape[0]))
    for noisy, clean, *_ in itertools.islice(singles, min(SHOWN, SHOWN_WIDTH // drawn)):
        denoised = tf.convert_to_tensor(denoise(noisy))
        last = (clean, tf.abs(denoised - clean)) if images.has_clean else (residual(noisy, denoised),)
        for row, image in zip(rows.values(), (noisy, denoised, *last), strict=True):
            row.append(image[0, ::every, ::every].numpy())
        for image in (noisy, denoised) if images.has_clean else ():
            labels.append(f"{float(psnr(clean, image)[0]):.1f} dB\nSSIM {float(ssim(clean, image)[0]):.2f}")
    width = max(1.1, drawn / 100)
    figure = Figure(figsize=(width * len(rows["noisy"]), (width + 0.2) * len(rows)), layout="constrained")
    axes = _draw_rows(figure, rows)
    for number, label in enumerate(labels):
        axes[number % 2, number // 2].set_xlabel(label, fontsize=8)
    save(path, figure)


def residual(noisy: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Return the noise that was removed, as an image in which no noise is grey."""
    return 0.5 + noisy - denoised


# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles do so in print.
CURVES: dict[str, tuple[str, Literal["-", "--"]]] = {"train": ("#0072b2", "-"), "validation": ("#d55e00", "--")}


def save_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], kept_epoch: int) -> None:
    """Write a PNG with a panel for each tag, with a curve over the epochs for each of `train` and `validation`.

    A vertical line marks the epoch whose model was kept.
    """
    figure, axes = panels(len(curves), 4, (3, 2.2))
    for axis, (tag, runs) in zip(axes, curves.items(), strict=True):
        for run, values in runs.items():
            color, style = CURVES[run]
            marker = "o" if len(values) == 1 else None
            axis.plot(range(1, len(values) + 1), values, style, color=color, marker=marker, markersize=4, label=run)
        axis.axvline(kept_epoch, color="#999999", linewidth=1, linestyle=":", label=f"epoch {kept_epoch}, kept")
        axis.set_title(tag, fontsize="medium")
        axis.set_xlabel("epoch", fontsize="small")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    save(path, figure)


def save_grid(path: Path, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> None:
    """Write a PNG of named rows of images, each float32 [H, W, C] in [0, 1], with `titles` above the columns."""
    figure = Figure(figsize=(1.1 * len(next(iter(rows.values()))), 3.5 / 3 * len(rows)), layout="constrained")
    for axis in _draw_rows(figure, rows, titles)[:, 0]:
        axis.yaxis.label.set(rotation=0, ha="right", va="center", fontsize="small")  # names can be long
    save(path, figure)


def _draw_rows(figure: Figure, rows: Mapping[str, Sequence | np.ndarray], titles: Sequence[str] = ()) -> np.ndarray:
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


def panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, in rows of `columns`, each of a `size` in inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]


def save(path: Path, figure: Figure) -> None:
    """Write `figure` as a PNG."""
    with atomic_path(path) as temporary:
        # Without metadata the same plot is the same bytes.
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
