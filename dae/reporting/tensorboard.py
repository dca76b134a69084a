"""A run's TensorBoard files: the writers `train` and `validation` write once per epoch, and `test` once at the end.

TensorBoard's step is the epoch, counted from 1; step 0 holds what is known before training. The parent folder of the
writers' folders is a session of the HParams tab: it holds the settings, and the tab shows the last values of `train`,
`validation` and `test` as its metrics.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import api as hparams_api

from dae import plugins
from dae.config import PLUGIN_FIELDS, RunConfig, map_texts
from dae.data.pipeline import Batch
from dae.models import networks
from dae.workdir.files import atomic_path
from dae.workdir.workdir import read_environment

# TAGS maps every tag to its description in TensorBoard and in docs/tensorboard.md; NAME stands for several names.
TAGS = {
    "loss/total": "the loss, without the share of bce in the first `--bce-steps`; for train, the mean over the epoch's "
    "images, computed in each step before the weights are updated; for validation, the mean over all images after the "
    "epoch",
    "loss/NAME": "each term of the loss, not multiplied by its weight; only if the loss has several terms",
    "quality/bce": "binary cross-entropy in nats per pixel; all of quality/ is computed after the epoch, with the same "
    "noise each time, on all validation images, and for train on the first training images (500 of the size of MNIST)",
    "quality/bce_excess": "binary cross-entropy above its lower bound, the entropy of the grey pixels of clean images",
    "quality/mse": "mean squared error",
    "quality/psnr": "peak signal-to-noise ratio in dB, mean over images; higher is better",
    "quality/ssim": "structural similarity, mean over images; 1 for equal images",
    "quality/accuracy": "Keras's `accuracy`, which the tutorial prints: share of pixels whose denoised value, rounded "
    "at 0.5, equals the clean value exactly",
    "quality/NAME": "any metric that is added to METRICS",
    "optimizer/learning_rate": "learning rate after the epoch",
    "optimizer/gradient_norm": "global norm of the gradient before clipping, mean over the epoch",
    "optimizer/update_to_weight_ratio": "global norm of a step's update divided by that of the weights, mean over the "
    "epoch; often near 0.001, and much larger if the learning rate is too high",
    "speed/images_per_second": "training speed, without evaluation, summaries and checkpoint at the end of an epoch",
    "images/noisy_denoised_clean_error": "the first eight validation images (training images if there are none), one "
    "per row: noisy, denoised, clean, and the absolute error, where black is 0 and white is 1",
    "weights/NAME": "histogram of the values of one kernel or bias",
    "latents/encoder": "histogram of the latents, the output of the layer `encoder`, of the first validation images "
    "(500 of the size of MNIST)",
    "run/configuration": "every setting",
    "run/layers": "the layers of the network, their output shapes, and their numbers of weights",
    "run/environment": "versions, git commit, command line and machine",
}
# TRAIN_ONLY maps fields of metrics.jsonl to the tags that only the writer `train` has.
TRAIN_ONLY = {tag.partition("/")[2]: tag for tag in TAGS if tag.startswith(("optimizer/", "speed/"))}
EVENTS = "events.out.tfevents.*"
IMAGES_SHOWN = 8


def scalars(line: Mapping[str, float], writer: str) -> dict[str, float]:
    """Return, by tag, the values of a line of metrics.jsonl or a report that belong to `writer`.

    `writer` is train, validation or test.
    """
    values = {}
    for field, value in line.items():
        name = field.removeprefix(f"{writer}_")
        if writer == "train" and field in TRAIN_ONLY:
            values[TRAIN_ONLY[field]] = value
        elif name == "loss":
            values["loss/total"] = value
        elif name.startswith("loss_"):
            values[f"loss/{name.removeprefix('loss_')}"] = value
        elif name != field:
            values[f"quality/{name}"] = value
    return values


def curves(lines: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Return, by tag and writer, the values in all lines of metrics.jsonl, except speed; tags are in TAGS's order."""
    values: dict[str, dict[str, list[float]]] = {}
    for writer in ("train", "validation"):
        for line in lines:
            for tag, value in scalars(line, writer).items():
                if not tag.startswith("speed/"):
                    values.setdefault(tag, {}).setdefault(writer, []).append(value)
    order = list(TAGS)
    return dict(sorted(values.items(), key=lambda item: order.index(_generic(item[0]))))


def _generic(tag: str) -> str:
    """Return the key of `tag` in TAGS: `tag` itself, or its first part with NAME."""
    return tag if tag in TAGS else f"{tag.partition('/')[0]}/NAME"


def description(tag: str) -> str:
    """Return the description of a tag."""
    return TAGS[_generic(tag)]


class TensorBoard:
    """Writes a run's TensorBoard files."""

    def __init__(self, run_dir: Path, config: RunConfig, model: keras.Model, samples: Batch, epochs_done: int) -> None:
        """Open the files after `epochs_done` epochs, and remove what a killed run wrote after these epochs.

        The first IMAGES_SHOWN `samples` are shown as images; the histogram of latents uses all.
        """
        self.folder = run_dir / "tensorboard"
        self._model, encoder = model, networks.encoder(model)
        # The models are compiled, because calling them layer by layer would take ten times as long.
        self._denoise, self._encode = tf.function(model), encoder and tf.function(encoder)
        self._noisy, self._clean = samples.noisy, samples.clean
        for name in ("train", "validation"):
            truncate_events(self.folder / name, epochs_done if epochs_done > 0 else -1)  # -1: step 0 too
        for file in (*self.folder.glob(EVENTS), *(self.folder / "test").glob(EVENTS)):
            file.unlink()
        self._writers = {
            name: tf.summary.create_file_writer(str(self.folder / name))
            for name in (("train", "validation") if config.validation_examples else ("train",))
        }
        with _file_writer(self.folder, step=0):
            # The name comes first, since the tab cuts off long ones; the folder distinguishes runs of the same name.
            hparams_api.hparams(_hparams(config), trial_id=f"{run_dir.name} ({run_dir.parent})")
        if epochs_done == 0:
            with self._writers["train"].as_default(step=0):
                self._write_texts(config, read_environment(run_dir))

    def _write_texts(self, config: RunConfig, environment: Mapping[str, Any]) -> None:
        layers = [
            (layer.name, type(layer).__name__, layer.output.shape[1:], f"{layer.count_params():,}")
            for layer in self._model.layers
        ]
        _text("run/configuration", ("field", "value"), dataclasses.asdict(config).items())
        _text("run/layers", ("layer", "type", "output", "weights"), layers)
        _text("run/environment", ("field", "value"), ((name, json.dumps(value)) for name, value in environment.items()))

    def write_graph(self, graph: tf.Graph) -> None:
        """Write the graph of a train step."""
        with self._writers["train"].as_default(step=0):
            tf.summary.graph(graph)

    def write_epoch(self, line: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl, the model's weights, and its outputs for the samples; flush them to disk."""
        for name, writer in self._writers.items():
            with writer.as_default(step=line["epoch"]):
                for tag, value in scalars(line, name).items():
                    tf.summary.scalar(tag, value, description=description(tag))
        with self._writers["train"].as_default(step=line["epoch"]):
            for variable in self._model.trainable_variables:
                _histogram(f"weights/{variable.path}", variable.numpy())
        with self._writers.get("validation", self._writers["train"]).as_default(step=line["epoch"]):
            noisy, clean = self._noisy[:IMAGES_SHOWN], self._clean[:IMAGES_SHOWN]
            denoised = self._denoise(noisy)
            tag = "images/noisy_denoised_clean_error"
            image = image_grid(noisy, denoised, clean, abs(denoised - clean))
            tf.summary.image(tag, image[np.newaxis], description=description(tag))
            if self._encode is not None:
                _histogram("latents/encoder", self._encode(self._noisy).numpy())
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def write_test(folder: Path, report: Mapping[str, float]) -> None:
    """Write the test metrics of a report with the writer `test` in `folder`; the step is the epoch of the model."""
    for file in (folder / "test").glob(EVENTS):
        file.unlink()
    with _file_writer(folder / "test", step=report["epoch"]):
        for tag, value in scalars(report, "test").items():
            tf.summary.scalar(tag, value, description=description(tag))


@contextlib.contextmanager
def _file_writer(folder: Path, step: float) -> Iterator[None]:
    """Write the summaries of the block, all of one step, to a new file in `folder`."""
    writer = tf.summary.create_file_writer(str(folder))
    with contextlib.closing(writer), writer.as_default(step=step):
        yield


def _histogram(tag: str, values: np.ndarray) -> None:
    # `histogram_pb` computes the bins with NumPy; tf.summary.histogram uses TensorFlow and takes 10 ms per histogram.
    tf.summary.experimental.write_raw_pb(histogram_pb(tag, values, description=description(tag)).SerializeToString())


def _text(tag: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a Markdown table as a text summary."""
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
    tf.summary.text(tag, table, description=description(tag))


def _hparams(config: RunConfig) -> dict[str, bool | float | str]:
    """Return the settings for the HParams tab: tuples as text, without digests and settings that are None."""
    labels = {name: map_texts(getattr(config, name), plugins.label) for name in PLUGIN_FIELDS}
    settings = dataclasses.asdict(config) | labels
    del settings["data_digest"], settings["weights_digest"]
    return {
        name: str(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value not in (None, ())
    }


def image_grid(*columns: np.ndarray) -> np.ndarray:
    """Return one image, float32 [rows * (H + 2), columns * (W + 2), C] in [0, 1], with a column for each argument.

    Each argument is [rows, H, W, C]; values outside [0, 1] are clipped.
    """
    framed = [np.pad(np.clip(column, 0, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]) for column in columns]
    return np.concatenate([np.concatenate(list(column)) for column in framed], axis=1)


def truncate_events(folder: Path, last_step: int) -> None:
    """Rewrite the event files in `folder` as one, without the events after `last_step`.

    Otherwise TensorBoard would show a step twice if a killed run wrote it and the resumed run writes it again. A file
    is read only up to a record that the kill cut short.
    """
    files = sorted(folder.glob(EVENTS))
    records: dict[bytes, None] = {}  # a kill during this rewriting can leave a record in two files
    for file in files:
        with contextlib.suppress(tf.errors.DataLossError):
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                if tf.compat.v1.Event.FromString(record).step <= last_step:
                    records[record] = None
    if files:
        with atomic_path(files[0]) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for record in records:
                writer.write(record)
        for file in files[1:]:
            file.unlink()
