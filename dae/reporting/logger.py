"""Reports of a run: messages, a progress bar, metrics.jsonl and TensorBoard."""

import time
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dae.config import RunConfig
from dae.data.pipeline import Batch, steps_per_epoch
from dae.errors import warn
from dae.reporting.tensorboard import TensorBoard
from dae.resolved import Resolved
from dae.workdir import workdir
from dae.workdir.workdir import Workdir

# In a log file, the time in seconds between two lines on the progress within an epoch.
SECONDS_BETWEEN_LINES = 30


class Console:
    """Prints messages on stdout unless `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def print(self, *lines: str) -> None:
        """Print lines, above the progress bar if there is one."""
        if not self.quiet:
            for line in lines:
                tqdm.write(line)


class Logger:
    """Reports the progress of a run and the results of its epochs; a context manager that closes what it opens."""

    def __init__(
        self,
        run: Workdir,
        config: RunConfig,
        resolved: Resolved,
        model: keras.Model,
        samples: Batch,
        console: Console,
        step: int,
        images_per_epoch: int,
    ) -> None:
        """Report from `step` on, with epochs of `images_per_epoch` images. TensorBoard shows the images of `samples`.

        If stderr is a terminal, a progress bar is shown there; else a line is printed every SECONDS_BETWEEN_LINES.
        """
        self._run, self._epochs, self._console = run, config.epochs, console
        self._model, self._noisy = model, samples.noisy
        epochs_done, steps_into_epoch = divmod(step, steps_per_epoch(images_per_epoch, config.batch_size))
        self.tensorboard = TensorBoard(run.output, config, resolved, model, samples, epochs_done)
        self._total = config.epochs * images_per_epoch
        self._images = epochs_done * images_per_epoch + steps_into_epoch * config.batch_size
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=self._total,
            initial=self._images,
            unit=" images",
            unit_scale=True,
            # A bar wider than its terminal would leave a line behind at each update, so the width is measured each
            # time. What does not fit is cut off at the end, so the description comes first.
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
            disable=console.quiet or None,  # None: only on a terminal
        )

    def progress(self, epoch: int, num_images: int, loss: tf.Tensor) -> None:
        """Report that `num_images` more images have been trained on; `loss` is the mean over the last batch."""
        # tqdm redraws the bar a few times per second; only then is the loss fetched.
        self._images += num_images
        if self._bar.update(num_images):
            self._bar.set_description_str(f"epoch {epoch}/{self._epochs}, loss {float(loss):.4f}", refresh=False)
        elif self._bar.disable and time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES:
            done = f"{self._images / self._total:.1%} of the run"
            self.print(f"epoch {epoch}/{self._epochs}: {done}, loss {float(loss):.4f}")
            self._last_line = time.monotonic()

    def print(self, message: str) -> None:
        """Print a message on the console."""
        self._console.print(message)

    def write_epoch(self, results: dict[str, float]) -> None:
        """Report the results of an epoch, a line of metrics.jsonl; it is on disk when this returns."""
        self._run.check()
        self.tensorboard.write_epoch(results)
        workdir.append_metrics(self._run.output, results)
        self._console.print(format_epoch(results, self._epochs))
        self._last_line = time.monotonic()
        if results["epoch"] == 1:
            warn_if_collapsed(self._model, self._noisy)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self.tensorboard.close()


def format_epoch(results: Mapping[str, float], epochs: int) -> str:
    """Format one line of metrics.jsonl for display."""
    text = f"epoch {results['epoch']}/{epochs}: train loss {results['train_loss']:.4f}"
    if "validation_loss" in results:
        text += f", validation loss {results['validation_loss']:.4f}"
    if "validation_psnr" in results:
        text += f", PSNR {results['validation_psnr']:.2f} dB, SSIM {results['validation_ssim']:.3f}"
    elif "validation_blind_spot_error" in results:
        text += f", blind-spot error {results['validation_blind_spot_error']:.5f}"
    return text + f" ({results['images_per_second']:,.0f} images/s, {results['seconds']:.1f} s)"


def warn_if_collapsed(model: keras.Model, noisy: tf.Tensor) -> None:
    """Warn if the model returns nearly the same image for every one of the first `noisy` images [N, H, W, C].

    The criterion is that the range of each output value over up to 20 inputs, averaged over values, is below 0.001.
    """
    denoised = model(noisy[:20]).numpy()
    if len(denoised) > 1 and float(np.ptp(denoised, axis=0).mean()) < 0.001:
        hint = "try another --learning-rate, or more --bce-steps"
        warn(f"the network returns nearly the same image for every input, and may never learn more; {hint}")
