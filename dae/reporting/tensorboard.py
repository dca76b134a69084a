"""A run's TensorBoard files: the writers `train` and `validation` write once per epoch, and `test` once at the end.

TensorBoard's step is the epoch, counted from 1; step 0 holds what is known before training. `validation`, or `train` if
nothing validates, is a session of the HParams tab: it holds the settings, and the tab shows its last values as metrics.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.histogram.summary_v2 import histogram_pb

# Not from `api`, which fails if TF_USE_LEGACY_KERAS is set.
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config
from tensorboard.plugins.hparams.summary_v2 import hparams as write_hparams

from dae import plugins
from dae.config import RunConfig, shortest
from dae.data.pipeline import Batch
from dae.files import atomic_path
from dae.models.fused_layers import fused
from dae.reporting.plots import residual
from dae.resolved import Resolved
from dae.workdir.workdir import read_environment

# TAGS maps every tag to its description in TensorBoard and in docs/tensorboard.md; NAME stands for several names.
TAGS = {
    "loss/total": "the loss, without the BCE warm-up of the first `--bce-steps`; for train, the mean over the epoch's "
    "images, computed in each step before the weights are updated; for validation, the mean over all images after the "
    "epoch",
    "loss/NAME": "each term of the loss, not multiplied by its weight; only if the loss has several terms",
    "quality/bce": "binary cross-entropy in nats per pixel; all of quality/ is computed after the epoch, with the same "
    "noise each time, on all validation images, and for train on the first training images (500 of the size of MNIST)",
    "quality/bce_excess": "binary cross-entropy above its lower bound, the entropy of the grey pixels of clean images",
    "quality/mse": "mean squared error",
    "quality/psnr": "peak signal-to-noise ratio in dB, mean over images; higher is better",
    "quality/psnr_of_mean_mse": "PSNR of the mean squared error over all images; only for test",
    "quality/ssim": "structural similarity, mean over images; 1 for equal images",
    "quality/accuracy": "Keras's `accuracy`, which the tutorial prints: fraction of pixels whose denoised value, "
    "rounded at 0.5, equals the clean value exactly",
    "quality/NAME": "any metric of `--metrics`, or that is added to METRICS",
    "optimizer/learning_rate": "learning rate after the epoch",
    "optimizer/gradient_norm": "global norm of the gradient before clipping, mean over the epoch",
    "optimizer/update_to_weight_ratio": "global norm of a step's update divided by that of the weights, mean over the "
    "epoch; often near 0.001, and much larger if the learning rate is too high",
    "speed/images_per_second": "training speed, without evaluation, summaries and checkpoint at the end of an epoch",
    "images/noisy_denoised_clean_error": "the first eight validation images (training images if there are none), one "
    "per row: noisy, denoised, clean, and the absolute error, where black is 0 and white is 1",
    "images/noisy_denoised_residual": "instead, if there are no clean images: noisy, denoised, and the noise that was "
    "removed, where grey is none",
    "quality/blind_spot_error": "without clean images: mean squared error of pixels that are predicted from others, "
    "against their noisy values; at least the variance of the noise",
    "quality/residual_mean": "without clean images: mean of the noise that was removed, 0 if it has mean 0",
    "quality/residual_correlation": "without clean images: correlation of the noise that was removed between "
    "neighbouring pixels, 0 if it is independent; more if structure is removed, or if the noise itself is correlated",
    "weights/NAME": "histogram of the values of one kernel or bias",
    "latents/encoder": "histogram of the latents, the output of the layer `encoder`, of the first validation images "
    "(500 of the size of MNIST)",
    "run/network": "the layers of the network, the conceptual graph of the Graphs tab; unless Keras cannot save them",
    "run/configuration": "every setting, what the run derives from it, versions, git commit, command line and machine",
}
# TRAIN_ONLY maps fields of metrics.jsonl to the tags that only the writer `train` has.
TRAIN_ONLY = {tag.partition("/")[2]: tag for tag in TAGS if tag.startswith(("optimizer/", "speed/"))}
EVENTS = "events.out.tfevents.*"
IMAGES, RESIDUALS, IMAGES_SHOWN = "images/noisy_denoised_clean_error", "images/noisy_denoised_residual", 8


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
    return dict(sorted(values.items(), key=lambda item: list(TAGS).index(_generic(item[0]))))


def _generic(tag: str) -> str:
    """Return the key of `tag` in TAGS: `tag` itself, or its first part with NAME."""
    return tag if tag in TAGS else f"{tag.partition('/')[0]}/NAME"


def description(tag: str) -> str:
    """Return the description of a tag."""
    return TAGS[_generic(tag)]


class TensorBoard:
    """Writes a run's TensorBoard files."""

    def __init__(
        self, run_dir: Path, config: RunConfig, resolved: Resolved, model: keras.Model, samples: Batch, epochs_done: int
    ) -> None:
        """Open the files after `epochs_done` epochs, and remove what a killed run wrote after these epochs.

        The first IMAGES_SHOWN `samples` are shown as images; the histogram of latents uses all.
        """
        self.folder = run_dir / "tensorboard"
        values = resolved.value_range
        derived = dataclasses.asdict(resolved) | {"value_range": (values.black, values.white), "dtype": values.dtype}
        settings = dataclasses.asdict(config) | derived
        self._model, self._samples, self._only_noisy = model, samples, config.only_noisy
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        for name in ("train", "validation"):
            truncate_events(self.folder / name, epochs_done if epochs_done > 0 else -1)  # -1: step 0 too
        truncate_events(self.folder / "test", -1)
        hparams = _hparams(config, resolved)
        metrics = ["quality/blind_spot_error"] if config.only_noisy else ["quality/psnr", "quality/ssim"]
        metrics += ["loss/total", *(f"quality/{plugins.label(text)}" for text in config.metrics)]
        with self._writer("validation" if resolved.validation_examples else "train").as_default(step=0):
            # The tab shows metrics in this order, and settings by name: five of each unless others are ticked.
            hparams_config([HParam(name) for name in hparams], map(Metric, metrics))
            # The name comes first, since the tab cuts off long ones; the folder distinguishes runs of the same name.
            write_hparams(hparams, trial_id=f"{run_dir.name} ({run_dir.parent})")
        if epochs_done == 0:
            rows = {"field": "value", "---": "---"} | settings | read_environment(run_dir)
            table = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows.items())
            with self._writer("train").as_default(step=0):
                tf.summary.text("run/configuration", table, description=description("run/configuration"))
                _conceptual_graph(model)

    def _writer(self, name: str) -> "tf.summary.SummaryWriter":
        """Return the writer of that name; its file is created when it is first used."""
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self.folder / name))
        return self._writers[name]

    def write_graph(self, graph: tf.Graph) -> None:
        """Write the graph of a train step."""
        with self._writer("train").as_default(step=0):
            tf.summary.graph(graph)

    @tf.function  # calling the network layer by layer would take ten times as long
    def _outputs(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Return the first denoised images, and the latents of all samples, if there is a layer `encoder`."""
        network = fused(self._model, training=False)
        return network(self._samples.noisy[:IMAGES_SHOWN]).images, network(self._samples.noisy).latents

    def write_epoch(self, line: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl, the model's weights, and its outputs for the samples; flush them to disk."""
        step = np.array(line["epoch"])  # see `_scalars`
        for name in ("train", "validation"):
            if values := scalars(line, name):
                with self._writer(name).as_default(step=step):
                    _scalars(values)
        with self._writer("train").as_default(step=step):
            for variable in self._model.trainable_variables:
                _histogram(f"weights/{variable.path}", variable.numpy())
        with self._writer("validation" if values else "train").as_default(step=step):
            denoised, latents = self._outputs.get_concrete_function()()  # which gives no warning of retracing
            noisy, clean = self._samples.noisy[:IMAGES_SHOWN], self._samples.clean[:IMAGES_SHOWN]
            columns, tag = [noisy, denoised, clean, abs(denoised - clean)], IMAGES
            if self._only_noisy:
                columns, tag = [noisy, denoised, residual(noisy, denoised)], RESIDUALS
            tf.summary.image(tag, image_grid(*columns)[np.newaxis], description=description(tag))
            if latents is not None:
                _histogram("latents/encoder", latents.numpy())
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def write_test(folder: Path, report: Mapping[str, float]) -> None:
    """Write the test metrics of a report with the writer `test` in `folder`; the step is the epoch of the model."""
    truncate_events(folder / "test", -1)
    writer = tf.summary.create_file_writer(str(folder / "test"))
    with contextlib.closing(writer), writer.as_default(step=report["epoch"]):
        _scalars(scalars(report, "test"))


def _scalars(values: Mapping[str, float]) -> None:
    for tag, value in values.items():
        # An array, because TensorFlow keeps a tensor for every Python number that it converts, until the process ends.
        tf.summary.scalar(tag, np.array(value), description=description(tag))


def _histogram(tag: str, values: np.ndarray) -> None:
    # `histogram_pb` computes the bins with NumPy; tf.summary.histogram uses TensorFlow and takes 10 ms per histogram.
    tf.summary.experimental.write_raw_pb(histogram_pb(tag, values, description=description(tag)).SerializeToString())


def _conceptual_graph(model: keras.Model) -> None:
    """Write the layers of `model` for the Graphs tab, as `keras.callbacks.TensorBoard` does, if Keras can save them."""
    metadata = tf.compat.v1.SummaryMetadata(summary_description=description("run/network"))
    metadata.plugin_data.plugin_name, metadata.plugin_data.content = "graph_keras_model", b"1"
    with contextlib.suppress(Exception):  # of a user's layer; the tab is then without them
        tf.summary.write("run/network", model.to_json(), metadata=metadata)


# Settings of the HParams tab.
HPARAMS = ("model", "loss", "optimizer", "learning_rate", "noise", "noise_level", "batch_size", "epochs", "seed")


def _hparams(config: RunConfig, resolved: Resolved) -> dict[str, float | str]:
    """Return the settings for the HParams tab; `preset` is the preset with whatever differs from it."""
    low, high = resolved.noise_level
    settings = {name: getattr(config, name) for name in HPARAMS}
    settings |= {"noise_level": low if low == high else f"{low:g} to {high:g}", "preset": shortest(config)}
    return {name: plugins.label(value) if isinstance(value, str) else value for name, value in settings.items()}


def image_grid(*columns: np.ndarray) -> np.ndarray:
    """Return one image, float32 [rows * (H + 2), columns * (W + 2), C] in [0, 1], with a column for each argument.

    Each argument is [rows, H, W, C]; values outside [0, 1] are clipped.
    """
    framed = [np.pad(np.clip(column, 0, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]) for column in columns]
    return np.concatenate([np.concatenate(list(column)) for column in framed], axis=1)


def truncate_events(folder: Path, last_step: int) -> None:
    """Rewrite the event files in `folder` as one, without the events after `last_step` and those of HParams.

    Otherwise TensorBoard would show a step twice if a killed run wrote it and the resumed run writes it again, and only
    the first of several HParams. A file is read only up to a record that the kill cut short.
    """
    files = sorted(folder.glob(EVENTS))
    records: dict[bytes, None] = {}  # a kill during this rewriting can leave a record in two files
    for file in files:
        with contextlib.suppress(tf.errors.DataLossError):
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                event = tf.compat.v1.Event.FromString(record)
                if event.step <= last_step and not any("_hparams_/" in value.tag for value in event.summary.value):
                    records[record] = None
    if records:
        with atomic_path(files[0]) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for record in records:
                writer.write(record)
    for file in files[1:] if records else files:
        file.unlink()
