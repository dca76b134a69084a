"""Console output of a run: messages on stdout, and, if stderr is a terminal, a progress bar there."""

import sys
from collections.abc import Mapping

import keras
import tensorflow as tf
from tqdm import tqdm


class Console:
    """Prints messages and a progress bar unless `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = tqdm(disable=True)

    def print(self, *lines: str) -> None:
        """Print lines, above the progress bar if there is one."""
        if not self._quiet:
            for line in lines:
                tqdm.write(line)

    def print_layers(self, model: keras.Model) -> None:
        """Print the table of a model's layers, as wide as the terminal."""
        if not self._quiet:
            model.summary()

    def start_bar(self, images: int, done: int) -> None:
        """Show a progress bar for training on `images` images in all, `done` of them already."""
        self._bar = tqdm(
            total=images,
            initial=done,
            unit=" images",
            unit_scale=True,
            # A bar wider than its terminal would leave a line behind at each update, so the width is measured each
            # time. What does not fit is cut off at the end, so the description comes first.
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
            disable=self._quiet or None,  # None: only on a terminal
        )

    def update_bar(self, description: str, images: int, loss: tf.Tensor) -> None:
        """Advance the bar by `images`."""
        # tqdm redraws the bar a few times per second; only then is the loss fetched.
        if self._bar.update(images):
            self._bar.set_description_str(f"{description}, loss {float(loss):.4f}", refresh=False)

    def close_bar(self) -> None:
        """Remove the progress bar."""
        self._bar.close()


def warn(message: str) -> None:
    """Print a warning on stderr, above a progress bar if there is one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def format_epoch(line: Mapping[str, float], epochs: int) -> str:
    """Format one line of metrics.jsonl for display."""
    text = f"epoch {line['epoch']}/{epochs}: train loss {line['train_loss']:.4f}"
    if "validation_loss" in line:
        text += f", validation loss {line['validation_loss']:.4f}"
        text += f", PSNR {line['validation_psnr']:.2f} dB, SSIM {line['validation_ssim']:.3f}"
    return text + f" ({line['images_per_second']:,.0f} images/s, {line['seconds']:.1f} s)"
