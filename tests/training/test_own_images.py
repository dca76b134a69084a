"""Runs on users' own pictures: pairs of several sizes and 16 bits, patches, whole images, moved data; evaluate.py."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, run_in_process
from PIL import Image

from dae import config as config_module
from dae.analysis.reproducibility import first_difference
from dae.config import RunConfig
from dae.data.pipeline import training_batches
from dae.errors import UsageError
from dae.evaluation.metrics import METRICS
from dae.reporting.logger import Logger
from dae.training import trainer
from dae.training.checkpoints import saved_in
from dae.training.task import prepare
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report

SIZES = {
    "train": [(40, 30), (28, 57), (16, 16), (33, 64), (50, 50), (31, 29)],
    "val": [(30, 41), (20, 14)],
    "test": [(33, 50), (33, 50), (24, 20), (14, 12)],
}


class Stop(Exception):
    """Raised in the place of a kill."""


@pytest.fixture(scope="module")
def data(mnist, tmp_path_factory) -> Path:
    """A folder of pairs of pictures of digits, of several sizes and 12 bits, in parts."""
    folder = tmp_path_factory.mktemp("own") / "digits"
    rng, number = np.random.default_rng(0), 0
    for part, sizes in SIZES.items():
        for height, width in sizes:
            tiled = np.tile(mnist.test.pixels[number, ..., 0].astype(np.float64) * 4095 / 255, (2, 3))[:height, :width]
            noisy = np.clip(tiled + rng.normal(0, 600, tiled.shape), 0, 4095)
            for role, pixels in (("clean", tiled), ("noisy", noisy)):
                path = folder / part / role / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.rint(pixels).astype(np.uint16)).save(path)
            number += 1
    return folder


def config_of(data: Path, **changes) -> RunConfig:
    small = RunConfig(epochs=2, batch_size=8, shards=2, intra_op_threads=1, bce_steps=2, checkpoint_every=2)
    own = replace(small, data=str(data), value_range=(0, 4095), patch_size=16, augment=True)
    return replace(own, **changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    trainer.train(config_of(data), folder, quiet=True)
    return folder


def test_run_on_pairs_records_that_no_noise_is_added(run, data):
    config = config_module.read(run / "config.json")
    assert (config.noise_level, config.value_range, config.patch_size) == (0, (0, 4095), 16)
    lines = read_metrics(run)
    patches = sum(max(1, height * width // 16**2) for height, width in SIZES["train"])
    assert [line["step"] for line in lines] == [-(-patches // 8), 2 * -(-patches // 8)]


def denoised_by_hand(model, noisy: np.ndarray) -> np.ndarray:
    """Return the denoised image of [H, W], which is mirrored at the bottom and right up to a multiple of 8."""
    height, width = noisy.shape
    mirrored = np.pad(noisy, ((0, -height % 8), (0, -width % 8)), "symmetric")
    return model(mirrored[None, ..., None], training=False).numpy()[:, :height, :width]


def test_metrics_of_whole_test_pictures_are_those_of_the_saved_model_computed_by_hand(run, data):
    model, report = load_model(run), read_report(run)
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for path in (data / "test" / "clean").iterdir():
        clean, noisy = (
            np.asarray(Image.open(data / "test" / role / path.name)).astype(np.float32) / np.float32(4095)
            for role in ("clean", "noisy")
        )
        denoised = denoised_by_hand(model, noisy)
        for name, metric in METRICS.items():
            values[name].append(float(metric(tf.constant(clean[None, ..., None]), tf.constant(denoised))[0]))
    for name in METRICS:
        assert report[f"test_{name}"] == pytest.approx(np.mean(values[name]), rel=1e-4), name


def test_resumed_run_equals_an_uninterrupted_one_also_after_its_data_was_moved(run, data, tmp_path, monkeypatch):
    def progress_and_stop(self: Logger, epoch: int, images: int, loss: tf.Tensor) -> None:
        progress(self, epoch, images, loss)
        calls.append(epoch)
        if calls == [1, 1]:  # after step 3 or 4, of which the checkpoint of step 2 knows nothing
            raise Stop

    calls: list[int] = []
    progress, before = Logger.progress, Path(shutil.copytree(data, tmp_path / "before"))
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "progress", progress_and_stop)
        with pytest.raises(Stop):
            trainer.train(config_of(before), tmp_path / "run", quiet=True)
    assert saved_in(tmp_path / "run" / "checkpoints" / "latest")[-1].name == "ckpt-2"
    moved, other = before.rename(tmp_path / "after"), Path(shutil.copytree(data, tmp_path / "other"))
    with pytest.raises(UsageError, match=r"before: no such file or folder; if it was moved, add --data with its new"):
        trainer.train(config_of(before), tmp_path / "run", resume=True)
    changed = np.asarray(Image.open(other / "test" / "noisy" / "8.png")).copy()
    changed[3, 4] ^= 1
    Image.fromarray(changed).save(other / "test" / "noisy" / "8.png")
    with pytest.raises(UsageError, match=rf"^--data: {other}: the images differ from those the run was made with"):
        trainer.train(config_of(other), tmp_path / "run", resume=True)
    trainer.train(config_of(moved), tmp_path / "run", resume=True, quiet=True)
    assert config_module.read(tmp_path / "run" / "config.json").data == str(moved)
    assert first_difference(tmp_path / "run", run) is None


@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_bits(run, data, tmp_path):
    config = config_of(data)
    (tmp_path / "config.json").write_text(config_module.to_json(config))
    command = [sys.executable, str(EXPERIMENTS / "run.py"), "--config", "config.json", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "latest" / "ckpt-2.index").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    trainer.train(config, tmp_path / "run", resume=True, quiet=True)
    assert first_difference(tmp_path / "run", run) is None


def test_samples_are_patches_of_the_images_that_are_large_enough(run, data):
    task = prepare(config_of(data))
    assert task.samples.clean.shape == (1, 16, 16, 1)  # the other validation picture is smaller
    (batch,) = training_batches(task.data.train, task.config).take(1)
    assert batch.clean.shape == (8, 16, 16, 1)


@pytest.mark.parametrize("size", [(16, 16), (29, 43), (11, 90)])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_evaluate_takes_one_image_of_any_size_without_noise(suffix, size, run, mnist, tmp_path):
    image = np.tile(mnist.test.pixels[0, ..., 0], (4, 4))[: size[0], : size[1]]
    if suffix == ".npy":
        np.save(tmp_path / "one.npy", image[None])
    else:
        (tmp_path / "one").mkdir()
        Image.fromarray(image).save(tmp_path / "one" / "a.png")
    place = tmp_path / ("one.npy" if suffix == ".npy" else "one")
    done = run_in_process("evaluate.py", run, "--data", place, "--noise-level", 0, "--figure", tmp_path / "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    clean = image / np.float32(255)
    psnr = METRICS["psnr"](tf.constant(clean[None, ..., None]), tf.constant(denoised_by_hand(load_model(run), clean)))
    assert "gaussian noise 0, clipped: BCE " in done.stdout
    assert f"PSNR {float(psnr[0]):.2f} dB" in done.stdout
    assert f"test: 1 image, {size[0]} x {size[1]}, grey, uint8" in done.stdout
    assert tf.io.decode_png((tmp_path / "a.png").read_bytes()).shape[0] > 100


def test_evaluate_adds_no_noise_to_pairs_unless_it_is_given(tiny_run, data, tmp_path):
    """Also if the run was trained on noise of level 0.5."""
    figure = ("--figure", tmp_path / "a.png")
    arguments = (
        "evaluate.py",
        tiny_run,
        "--data",
        data / "test",
        "--image-size",
        28,
        "--value-range",
        0,
        4095,
        *figure,
    )
    done = run_in_process(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 pairs of noisy and clean images, 28 x 28" in done.stdout
    assert " on pairs of noisy and clean images: " in done.stdout
    done = run_in_process(*arguments, "--noise-level", 0.1)
    assert "on gaussian noise 0.1, " in done.stdout


def test_evaluate_takes_pictures_of_several_sizes_for_a_run_on_images_of_one_size(tiny_run, data, tmp_path):
    arguments = ("--data", data, "--value-range", 0, 4095, "--figure", tmp_path / "a.png")
    done = run_in_process("evaluate.py", tiny_run, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test: 4 pairs of noisy and clean images, 14 x 12 to 33 x 50, grey, uint16" in done.stdout
    done = run_in_process("evaluate.py", tiny_run, *arguments, "--noise-levels", 0, 0.1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| gaussian | 0.1 |" in done.stdout


def test_evaluate_on_the_runs_own_data_repeats_its_report(run, tmp_path):
    done = run_in_process("evaluate.py", run, "--figure", tmp_path / "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((run / "report.json").read_text())
    assert f"PSNR {report['test_psnr']:.2f} dB, SSIM {report['test_ssim']:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "32"], "--image-size: applies to --data, which is not given"),
        (["--grey"], "--grey: applies to --data, which is not given"),
        (["--data", "nowhere"], "--data: nowhere: no such file or folder"),
        (["--data", "colour.npy"], "--data: the model takes images of 1 channels, not of 3; --grey converts them"),
        (["--data", "small.npy"], "H and W >= 11"),
        (["--data", "deep.npy"], "white is 65535; add --value-range 0 4095 if 4095 is white"),
    ],
)
def test_evaluate_refuses_data_in_one_line(arguments, message, run, tmp_path):
    np.save(tmp_path / "colour.npy", np.full((2, 28, 28, 3), 200, np.uint8))
    np.save(tmp_path / "small.npy", np.full((2, 10, 28), 200, np.uint8))
    np.save(tmp_path / "deep.npy", np.full((2, 28, 28), 4095, np.uint16))
    before = sorted(tmp_path.iterdir())
    done = run_in_process("evaluate.py", run, *arguments, "--figure", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--image-size", 32], "--data: nowhere: no such file or folder"),
        (
            ["--data", "digits"],
            "14 x 12 (11.png) to 50 x 50 (4.png); add --image-size to scale and crop them to one, or",
        ),
        (
            ["--data", "digits", "--patch-size", 17],
            "--patch-size: 17 exceeds the size of an image of --data: digits, 16",
        ),
        (["--data", "digits", "--patch-size", 16], "white is 65535; add --value-range 0 4095 if 4095 is white"),
        (["--data", "digits", "--patch-size", 8], "--patch-size: expected a whole number from 11"),
        (
            ["--data", "digits", "--value-range", 4095, 0],
            "--value-range: expected two finite numbers in ascending order",
        ),
    ],
)
def test_a_run_refuses_data_in_one_line_before_it_writes_anything(arguments, message, data, tmp_path):
    (tmp_path / "digits").symlink_to(data)
    done = run_in_process("run.py", *arguments, "--run-dir", "runs/run", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr.replace(f"{tmp_path}/", "")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "digits"]
