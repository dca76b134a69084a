"""Pictures made with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dae.run_directory import replacing


def save_denoised(path: Path, noisy: np.ndarray, denoised: np.ndarray, clean: np.ndarray) -> None:
    """Writes a PNG with a column for each image and the rows noisy, denoised, clean.

    Each argument is float32 [N, H, W, C] in [0, 1] with C 1 (shown in grey) or 3.
    """
    save_grid(path, {"noisy": list(noisy), "denoised": list(denoised), "clean": list(clean)})


def save_grid(path: Path, rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str] = ()) -> None:
    """Writes a PNG of named rows of images, each float32 [H, W, C] in [0, 1], with `titles` over the columns."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.1 * columns, 3.5 / 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize="medium")
    with replacing(path) as temporary:
        # No metadata: the same images give the same bytes.
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
