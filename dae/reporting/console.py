"""What a run says on the terminal: lines on stdout, and where stderr is a terminal, a progress bar there."""

import sys

import keras
import tensorflow as tf
from tqdm import tqdm


class Progress:
    """The voice of a run; a context that takes the progress bar away from further lines."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._bar = tqdm(disable=True)

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if not self.quiet:
            tqdm.write(line)

    def warn(self, line: str) -> None:
        """Prints a line on stderr, also when quiet."""
        tqdm.write(f"warning: {line}", file=sys.stderr)

    def show_layers(self, model: keras.Model) -> None:
        """Prints the table of a network's layers, as wide as the terminal has room for."""
        if not self.quiet:
            model.summary()

    def start_bar(self, images: int, done: int) -> None:
        """Shows how many of so many images have been trained on."""
        self._bar = tqdm(
            total=images,
            initial=done,
            unit=" images",
            unit_scale=True,
            # The width is asked for each time: a bar that is wider than its terminal leaves a line behind at each
            # step. What does not fit is cut off at the end, so what matters most comes first, in the description.
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
            disable=self.quiet or None,  # None: shown on a terminal only
        )

    def update(self, epoch: str, images: int, loss: tf.Tensor) -> None:
        """Counts the images of some steps of `epoch`, the last of which had the mean `loss`."""
        # tqdm redraws itself a few times a second, and only then is the loss fetched.
        if self._bar.update(images):
            self._bar.set_description_str(f"epoch {epoch}, loss {float(loss):.4f}", refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def epoch_in_words(line: dict[str, float], epochs: int) -> str:
    """One line of metrics.jsonl for a reader."""
    words = f"epoch {line['epoch']}/{epochs}: train loss {line['train_loss']:.4f}"
    if "validation_loss" in line:
        words += f", validation loss {line['validation_loss']:.4f}"
        words += f", PSNR {line['validation_psnr']:.2f} dB, SSIM {line['validation_ssim']:.3f}"
    return words + f" ({line['images_per_second']:,.0f} images/s, {line['seconds']:.1f} s)"
