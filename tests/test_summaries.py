import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dae import summaries, trainer

VALIDATION_SCALARS = {"loss/total"} | {
    f"quality/{name}" for name in ("bce", "bce_excess", "mse", "psnr", "ssim", "accuracy")
}
TRAIN_SCALARS = {"loss/total", "optimizer/learning_rate", "speed/images_per_second"}


def events(folder: Path) -> EventAccumulator:
    """All that TensorBoard would show of a folder."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def values(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]


def check_curves(folder: Path) -> None:
    """TensorBoard's curves are the lines of metrics.jsonl, one value an epoch."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("train", "validation"):
        shown = events(folder / "tensorboard" / name)
        for tag, fields in summaries.SCALARS.items():
            if name in fields:
                expected = [(line["epoch"], pytest.approx(line[fields[name]], rel=1e-6)) for line in lines]
                assert values(shown, tag) == expected, (name, tag)


def test_tags_steps_and_values_read_back_right(tiny_run):
    train, validation = (events(tiny_run / "tensorboard" / name) for name in ("train", "validation"))
    assert set(train.Tags()["tensors"]) == TRAIN_SCALARS | {"config"}
    assert set(validation.Tags()["tensors"]) == VALIDATION_SCALARS | {"images/noisy_denoised_clean"}
    check_curves(tiny_run)
    (config,) = train.Tensors("config")
    assert "| batch_size | 64 |" in tf.make_ndarray(config.tensor_proto).item().decode()


def test_the_image_grid_shows_noisy_denoised_and_clean(tiny_run, mnist):
    shown = events(tiny_run / "tensorboard" / "validation").Tensors("images/noisy_denoised_clean")
    assert [event.step for event in shown] == [1, 2, 3]
    width, height, *pictures = tf.make_ndarray(shown[-1].tensor_proto)
    assert (int(width), int(height), len(pictures)) == (3 * 30, 8 * 30, 1)
    picture = tf.io.decode_png(pictures[0]).numpy()
    np.testing.assert_array_equal(picture[1:29, 61:89], mnist.validation[-256])
    assert abs(picture[1:29, 1:29].astype(float) - mnist.validation[-256]).mean() > 20


def test_what_a_kill_left_beyond_the_checkpoint_is_dropped_and_written_again(tmp_path, tiny_run):
    folder = tmp_path / "run"
    trainer.train(replace(TINY, epochs=2), folder)
    for path in (folder / "checkpoints" / "newest").glob("ckpt-20.*"):
        path.unlink()  # as if killed after the summaries of epoch 2, before its checkpoint
    for file in (folder / "tensorboard").glob("*/events*"):
        file.write_bytes(file.read_bytes()[:-7])  # and in the middle of a record
    trainer.train(TINY, folder, resume=True)
    check_curves(folder)
    assert (folder / "report.json").read_text() == (tiny_run / "report.json").read_text()


def test_dropping_twice_or_interrupted_doubles_nothing(tmp_path, tiny_run):
    folder = tmp_path / "events"
    shutil.copytree(tiny_run / "tensorboard" / "train", folder)
    (file,) = folder.iterdir()
    shutil.copy(file, file.with_name(file.name + ".copy"))
    for _ in range(2):
        summaries.drop_after(folder, 2)
    assert [step for step, _ in values(events(folder), "loss/total")] == [1, 2]
    assert len(list(folder.iterdir())) == 1
