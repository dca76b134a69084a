"""Where the training loop reports to: the console, metrics.jsonl and TensorBoard."""

from pathlib import Path

import keras
import tensorflow as tf

from dae.config import RunConfig
from dae.data.pipeline import Batch, steps_per_epoch
from dae.reporting.console import Console, format_epoch
from dae.reporting.tensorboard import TensorBoard
from dae.workdir import workdir


class Logger:
    """Reports the progress of a run and the results of its epochs; a context manager that closes what it opens."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        model: keras.Model,
        samples: Batch,
        console: Console,
        step: int,
        images: int,
    ) -> None:
        """Report from `step` on, with epochs of `images` images; what a killed run reported after `step` is dropped.

        TensorBoard shows the images of `samples`.
        """
        self._run_dir, self._config, self._console = run_dir, config, console
        batch_size = min(config.batch_size, images)
        epochs_done, steps_into_epoch = divmod(step, steps_per_epoch(images, batch_size))
        workdir.truncate_metrics(run_dir, epochs_done)
        self._tensorboard = TensorBoard(run_dir, config, model, samples, epochs_done)
        console.start_bar(config.epochs * images, epochs_done * images + steps_into_epoch * batch_size)

    @property
    def tensorboard_folder(self) -> Path:
        """The folder of the run's TensorBoard files."""
        return self._tensorboard.folder

    def write_graph(self, graph: tf.Graph) -> None:
        """Report the graph of a train step."""
        self._tensorboard.write_graph(graph)

    def progress(self, epoch: int, images: int, loss: tf.Tensor) -> None:
        """Report that `images` more images have been trained on; `loss` is the mean over the last batch."""
        self._console.update_bar(f"epoch {epoch}/{self._config.epochs}", images, loss)

    def print(self, message: str) -> None:
        """Print a message on the console."""
        self._console.print(message)

    def write_epoch(self, line: dict[str, float]) -> None:
        """Report a line of metrics.jsonl; it is on disk when this returns."""
        self._tensorboard.write_epoch(line)
        workdir.append_metrics(self._run_dir, line)
        self._console.print(format_epoch(line, self._config.epochs))

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception: object) -> None:
        self._console.close_bar()
        self._tensorboard.close()


class NoLogger:
    """Reports nothing, for workers other than the chief."""

    tensorboard_folder = Path()

    def write_graph(self, graph: tf.Graph) -> None:
        """Do nothing, as all methods."""

    def progress(self, epoch: int, images: int, loss: tf.Tensor) -> None:
        """Do nothing."""

    def print(self, message: str) -> None:
        """Do nothing."""

    def write_epoch(self, line: dict[str, float]) -> None:
        """Do nothing."""
