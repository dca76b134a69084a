"""What TensorBoard shows: one writer each for train and validation, written once per epoch.

TensorBoard's step is the epoch, counted from 1; step 0 holds the configuration. The HParams tab takes the folder above
these for a session: it holds the settings, and the last values of `train`, `validation` and `test` are its metrics.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams_api

from dae import user_code
from dae.config import RunConfig
from dae.run_directory import replacing

# Tag -> the fields of a line of metrics.jsonl that the train and the validation writer show under it.
SCALARS: dict[str, Mapping[str, str]] = {
    "loss/total": {"train": "train_loss", "validation": "validation_loss"},
    "quality/bce": {"validation": "validation_bce"},
    "quality/bce_excess": {"validation": "validation_bce_excess"},
    "quality/mse": {"validation": "validation_mse"},
    "quality/psnr": {"validation": "validation_psnr"},
    "quality/ssim": {"validation": "validation_ssim"},
    "quality/accuracy": {"validation": "validation_accuracy"},
    "optimizer/learning_rate": {"train": "learning_rate"},
    "speed/images_per_second": {"train": "images_per_second"},
}
EVENTS = "events.out.tfevents.*"
IMAGES = "images/noisy_denoised_clean"
CONFIG = "config"


def scalars(line: Mapping[str, float]) -> dict[str, Mapping[str, str]]:
    """SCALARS, and the same for the terms of the loss that a line of metrics.jsonl or a report has."""
    terms = dict.fromkeys(name.partition("_loss_")[2] for name in line if "_loss_" in name)
    return SCALARS | {
        f"loss/{term}": {"train": f"train_loss_{term}", "validation": f"validation_loss_{term}"} for term in terms
    }


class Summaries:
    """The summary writers of a run; a context that closes them."""

    def __init__(self, folder: Path, config: RunConfig, last_epoch: int) -> None:
        """Goes on in `folder` after `last_epoch`; what a killed run wrote beyond it is dropped."""
        for name in ("train", "validation"):
            drop_after(folder / name, last_epoch if last_epoch > 0 else -1)  # -1: the configuration too
        for file in (*folder.glob(EVENTS), *(folder / "test").glob(EVENTS)):
            file.unlink()
        with contextlib.closing(tf.summary.create_file_writer(str(folder))) as writer, writer.as_default(step=0):
            hparams_api.hparams(_hparams(config))
        self._writers = {
            name: tf.summary.create_file_writer(str(folder / name))
            for name in (("train", "validation") if config.validation_examples else ("train",))
        }
        if last_epoch == 0:
            rows = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
            with self._writers["train"].as_default(step=0):
                tf.summary.text(CONFIG, "\n".join(["| field | value |", "| --- | --- |", *rows]))

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write_epoch(self, line: Mapping[str, float], noisy, denoised, clean) -> None:
        """Shows one line of metrics.jsonl, and a few images, float32 [few, H, W, C], and flushes all to disk."""
        for tag, fields in scalars(line).items():
            for name, field in fields.items():
                if field in line:
                    with self._writers[name].as_default(step=line["epoch"]):
                        tf.summary.scalar(tag, line[field])
        images_writer = self._writers.get("validation", self._writers["train"])
        with images_writer.as_default(step=line["epoch"]):
            tf.summary.image(IMAGES, grid(noisy, denoised, clean)[np.newaxis])
        for writer in self._writers.values():
            writer.flush()


def write_test(folder: Path, report: Mapping[str, float]) -> None:
    """Shows the test figures of a report at the epoch that they are of, as the run `test` in `folder`."""
    for file in (folder / "test").glob(EVENTS):
        file.unlink()
    writer = tf.summary.create_file_writer(str(folder / "test"))
    with contextlib.closing(writer), writer.as_default(step=report["epoch"]):
        for tag, fields in scalars(report).items():
            field = fields.get("validation", "").replace("validation_", "test_")
            if field in report:
                tf.summary.scalar(tag, report[field])


def _hparams(config: RunConfig) -> dict[str, bool | float | str]:
    """The settings as TensorBoard's HParams tab takes them: pairs as text, without what is not set, and digests."""
    settings = dataclasses.asdict(config) | {"loss": user_code.label(config.loss), "data_digest": None}
    settings["noise"] = user_code.label(config.noise)
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
