"""What TensorBoard shows: one writer each for train and validation, written once per epoch.

TensorBoard's step is the epoch, counted from 1; step 0 holds what is known at the start. The HParams tab takes the
folder above these for a session: it holds the settings, and the last values of `train`, `validation` and `test` are
its metrics.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import api as hparams_api

from dae import plugins
from dae.config import RunConfig
from dae.data.pipeline import Batch
from dae.models import networks
from dae.workdir.workdir import read_environment, replacing

# Every tag and its meaning, as TensorBoard and README.md show them; in capitals, what stands for several names.
TAGS = {
    "loss/total": "what is minimised: the mean over the epoch's training batches as they came, each before its step; "
    "over all validation images after the epoch",
    "loss/NAME": "its terms, where it has several, without their weights",
    "quality/bce": "binary cross-entropy, nats per pixel; like all of `quality/` after the epoch, on all validation "
    "images, and on the first 500 training images with noise that is always the same",
    "quality/bce_excess": "the same less its floor, the entropy of the clean images' grey pixels, which no denoiser "
    "can go below",
    "quality/mse": "mean squared error",
    "quality/psnr": "peak signal-to-noise ratio of each image, averaged, in dB; higher is better",
    "quality/ssim": "structural similarity of each image, averaged; 1 is equal",
    "quality/accuracy": "Keras's `accuracy`, which the tutorial prints: pixels exactly right once cut at 0.5",
    "quality/NAME": "any other metric that is added to `METRICS`",
    "optimizer/learning_rate": "the learning rate after the epoch",
    "optimizer/gradient_norm": "length of the gradient of all weights, before any clipping, averaged over the "
    "epoch's steps",
    "optimizer/update_to_weight_ratio": "length of the change that the epoch's last step made to the weights, over "
    "the length of the weights; often near 0.001, and far above it where the learning rate is too high",
    "speed/images_per_second": "training speed, without validation, summaries and checkpoint",
    "images/noisy_denoised_clean_error": "eight fixed validation images, a row each: noisy, denoised, clean, and how "
    "far these two are apart, from black, 0, to white, 1",
    "weights/NAME": "histogram of the weights of one layer",
    "code/encoder": "histogram of the code, the output of the layer `encoder`, of 500 fixed validation images",
    "run/configuration": "every setting, as the run was begun",
    "run/layers": "the network's layers, the shapes they return, and their weights",
    "run/environment": "versions, source, command line and machine",
}
# What the run `train` shows beside its losses and quality: field of metrics.jsonl -> tag.
OF_TRAINING = {tag.partition("/")[2]: tag for tag in TAGS if tag.startswith(("optimizer/", "speed/"))}
EVENTS = "events.out.tfevents.*"
IMAGES_SHOWN = 8


def scalars(line: Mapping[str, float], run: str) -> dict[str, float]:
    """Tag -> value: what `run` (train, validation or test) shows of a line of metrics.jsonl or of a report."""
    shown = {}
    for field, value in line.items():
        name = field.removeprefix(f"{run}_")
        if run == "train" and field in OF_TRAINING:
            shown[OF_TRAINING[field]] = value
        elif name == "loss":
            shown["loss/total"] = value
        elif name.startswith("loss_"):
            shown[f"loss/{name.removeprefix('loss_')}"] = value
        elif name != field:
            shown[f"quality/{name}"] = value
    return shown


def curves(lines: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Tag -> run -> the value of each line of metrics.jsonl; without what measures time."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in ("train", "validation"):
        for line in lines:
            for tag, value in scalars(line, run).items():
                if not tag.startswith("speed/"):
                    found.setdefault(tag, {}).setdefault(run, []).append(value)
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _described(tag: str) -> str:
    """The key in TAGS under which a tag is described; "quality/NAME" for a metric that was added."""
    return tag if tag in TAGS else f"{tag.partition('/')[0]}/NAME"


def _place(tag: str) -> int:
    return list(TAGS).index(_described(tag))


def description(tag: str) -> str:
    """What a tag means."""
    return TAGS[_described(tag)]


class Summaries:
    """The summary writers of a run; a context that closes them."""

    def __init__(self, folder: Path, config: RunConfig, model: keras.Model, examples: Batch, last_epoch: int) -> None:
        """Goes on in the run `folder` after `last_epoch`; what a killed run wrote beyond it is dropped.

        `examples` are (noisy, clean), float32 [some, H, W, C]: the first few are shown, and the codes of all.
        """
        self._model, encoder = model, networks.encoder(model)
        # Compiled: layer by layer they would take ten times as long.
        self._denoise, self._encode = tf.function(model), encoder and tf.function(encoder)
        self._noisy, self._clean = examples
        shown = folder / "tensorboard"
        for name in ("train", "validation"):
            drop_after(shown / name, last_epoch if last_epoch > 0 else -1)  # -1: the start too
        for file in (*shown.glob(EVENTS), *(shown / "test").glob(EVENTS)):
            file.unlink()
        with contextlib.closing(tf.summary.create_file_writer(str(shown))) as writer, writer.as_default(step=0):
            hparams_api.hparams(_hparams(config))
        self._writers = {
            name: tf.summary.create_file_writer(str(shown / name))
            for name in (("train", "validation") if config.validation_examples else ("train",))
        }
        if last_epoch == 0:
            layers = [
                (layer.name, type(layer).__name__, layer.output.shape[1:], f"{layer.count_params():,}")
                for layer in model.layers
            ]
            with self._writers["train"].as_default(step=0):
                _text("run/configuration", ("field", "value"), dataclasses.asdict(config).items())
                _text("run/layers", ("layer", "kind", "returns", "weights"), layers)
                environment = read_environment(folder)
                _text("run/environment", ("what", "value"), ((k, json.dumps(v)) for k, v in environment.items()))

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write_graph(self, train_step: Any, batch_size: int) -> None:
        """Shows the graph of `train_step`, a tf.function, for a batch of so many images."""
        batch = tf.TensorSpec([batch_size, *self._clean.shape[1:]], tf.float32)
        with self._writers["train"].as_default(step=0):
            tf.summary.graph(train_step.get_concrete_function(batch, batch).graph)

    def write_epoch(self, line: Mapping[str, float]) -> None:
        """Shows one line of metrics.jsonl, and what the model does with the examples, and flushes all to disk."""
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
            picture = grid(noisy, denoised, clean, abs(denoised - clean))
            tf.summary.image(tag, picture[np.newaxis], description=description(tag))
            if self._encode is not None:
                _histogram("code/encoder", self._encode(self._noisy).numpy())
        for writer in self._writers.values():
            writer.flush()


def write_test(folder: Path, report: Mapping[str, float]) -> None:
    """Shows the test figures of a report at the epoch that they are of, as the run `test` in `folder`."""
    for file in (folder / "test").glob(EVENTS):
        file.unlink()
    writer = tf.summary.create_file_writer(str(folder / "test"))
    with contextlib.closing(writer), writer.as_default(step=report["epoch"]):
        for tag, value in scalars(report, "test").items():
            tf.summary.scalar(tag, value, description=description(tag))


def _histogram(tag: str, values: np.ndarray) -> None:
    """Shows a histogram; tf.summary.histogram takes 10 ms for each, which is too much for so many."""
    tf.summary.experimental.write_raw_pb(histogram_pb(tag, values, description=description(tag)).SerializeToString())


def _text(tag: str, head: Sequence[str], rows) -> None:
    """Shows a table."""
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
    tf.summary.text(tag, table, description=description(tag))


def _hparams(config: RunConfig) -> dict[str, bool | float | str]:
    """The settings as TensorBoard's HParams tab takes them: pairs as text, without what is not set, and digests."""
    settings = dataclasses.asdict(config) | {"loss": plugins.label(config.loss), "data_digest": None}
    settings["noise"] = plugins.label(config.noise)
    return {
        name: str(value) if isinstance(value, tuple) else value for name, value in settings.items() if value is not None
    }


def grid(*columns: np.ndarray) -> np.ndarray:
    """One picture, float32 [rows * (H + 2), columns * (W + 2), C] in [0, 1]: a column for each argument.

    Each argument is [rows, H, W, C]; what leaves [0, 1] is clipped.
    """
    framed = [np.pad(np.clip(column, 0, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]) for column in columns]
    return np.concatenate([np.concatenate(list(column)) for column in framed], axis=1)


def drop_after(folder: Path, last_step: int) -> None:
    """Rewrites the event files in `folder` as one, without what comes after `last_step`.

    TensorBoard would show a step that a killed run wrote and its resume writes again twice. A record that the
    kill cut short ends the reading of its file.
    """
    files = sorted(folder.glob(EVENTS))
    kept: dict[bytes, None] = {}  # a kill during this rewriting may have left a record in two files
    for file in files:
        try:
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                if tf.compat.v1.Event.FromString(record).step <= last_step:
                    kept[record] = None
        except tf.errors.DataLossError:
            pass
    if files:
        with replacing(files[0]) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for record in kept:
                writer.write(record)
        for file in files[1:]:
            file.unlink()
