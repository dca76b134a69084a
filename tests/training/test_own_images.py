"""Runs on users' own pictures: pairs of several sizes and 12 bits, patches of which are trained on."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import denoised_by_hand
from PIL import Image
from runs import PAIR_SIZES, config_of

from dae import config as config_module
from dae import resolved
from dae.data.pipeline import training_batches
from dae.errors import UsageError
from dae.evaluation.metrics import METRICS
from dae.training import trainer
from dae.training.task import prepare
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report


def test_run_on_pairs_adds_no_noise_and_trains_on_as_many_patches_as_their_areas_hold(finished_run):
    run = finished_run("pairs")
    assert config_module.read(run / "config.json").noise_level is None
    assert resolved.read(run).noise_level == (0, 0)
    patches = sum(max(1, height * width // 16**2) for height, width in PAIR_SIZES["train"])
    assert [line["step"] for line in read_metrics(run)] == [-(-patches // 8), 2 * -(-patches // 8)]


def test_metrics_of_whole_test_pictures_are_those_of_the_saved_model_computed_by_hand(finished_run, files):
    model, report = load_model(finished_run("pairs")), read_report(finished_run("pairs"))
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for path in (files / "pairs" / "test" / "clean").iterdir():
        clean, noisy = (
            np.asarray(Image.open(path.parent.parent / role / path.name)).astype(np.float32) / np.float32(4095)
            for role in ("clean", "noisy")
        )
        denoised = denoised_by_hand(model, noisy)
        for name, metric in METRICS.items():
            values[name].append(float(metric(tf.constant(clean[None, ..., None]), tf.constant(denoised))[0]))
    for name in METRICS:
        assert report[f"test_{name}"] == pytest.approx(np.mean(values[name]), rel=1e-4), name


def test_samples_are_patches_of_the_images_that_are_large_enough(files):
    task = prepare(config_of(files, "pairs"))
    assert task.samples.clean.shape == (1, 16, 16, 1)  # the other validation picture is smaller
    (batch,) = training_batches(task.data.train, task.config).take(1)
    assert batch.clean.shape == (8, 16, 16, 1)


def test_data_may_be_moved_before_a_resume_but_not_change(finished_run, files, tmp_path):
    run = finished_run("pairs")
    config, recorded = config_of(files, "pairs"), resolved.read(run)
    moved = Path(shutil.copytree(files / "pairs", tmp_path / "moved"))
    assert prepare(replace(config, data=str(moved)), recorded=recorded).resolved == recorded
    changed = np.asarray(Image.open(moved / "test" / "noisy" / "8.png")).copy()
    changed[3, 4] ^= 1
    Image.fromarray(changed).save(moved / "test" / "noisy" / "8.png")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with pytest.raises(UsageError, match=rf"^--data: {moved}: the images differ from those the run was made with"):
        trainer.train(replace(config, epochs=3, data=str(moved)), copy, resume=True)
    assert (copy / "config.json").read_bytes() == (run / "config.json").read_bytes()
