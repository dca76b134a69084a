"""Pictures made with matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dae.run_directory import replacing


def save_denoised(path: Path, noisy: np.ndarray, denoised: np.ndarray, clean: np.ndarray) -> None:
    """Writes a PNG with a column for each image and the rows noisy, denoised, clean.

    Each argument is float32 [N, H, W, C] in [0, 1] with C 1 (shown in grey) or 3.
    """
    rows = {"noisy": noisy, "denoised": denoised, "clean": clean}
    figure = Figure(figsize=(1.1 * len(clean), 3.5), layout="constrained")
    axes = figure.subplots(len(rows), len(clean), squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name)
    with replacing(path) as temporary:
        # No metadata: the same images give the same bytes.
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
