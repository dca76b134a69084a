"""Runs on users' own pictures: pairs of several sizes and 12 bits in patches, and noisy ones without clean ones."""

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tifffile
from helpers import denoised_by_hand, run_in_process
from PIL import Image
from runs import PAIR_SIZES, config_of

from dae import cli, resolved
from dae import config as config_module
from dae.commands.evaluate import EvaluateArguments, evaluated_config
from dae.config import RunConfig
from dae.data import datasets
from dae.data.pipeline import training_batches
from dae.errors import UsageError
from dae.evaluation.metrics import METRICS, NOISY_METRICS, residual_correlation
from dae.replicas import Replicas
from dae.training import trainer
from dae.training.checkpoints import Checkpoints
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


SIGMA = 0.1


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(mnist, tmp_path_factory) -> Path:
    """Grey digits, in grey, with noise that 8 bits do not clip; the test pictures have clean ones."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, digit in enumerate(mnist.test.pixels[:60, ..., 0]):
        clean = 0.4 + 0.2 * digit / 255
        noisy = clean + SIGMA * rng.standard_normal(clean.shape)
        split = "train" if number < 50 else "test/noisy"
        save(folder / split / f"{number}.png", noisy)
        if number >= 50:
            save(folder / "test" / "clean" / f"{number}.png", clean)
    return folder


@pytest.fixture(scope="module")
def run(folder, files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "noisy"
    config = config_of(
        files, data=None, noisy=str(folder), loss="noise2void", learning_rate=0.01, validation_examples=10, epochs=3
    )
    trainer.train(config, path, quiet=True)
    return path


def test_a_run_reports_what_can_be_known_without_clean_images_and_psnr_only_for_tests_that_have_some(run):
    for line in read_metrics(run):
        names = {name.removeprefix("validation_") for name in line if name.startswith("validation_")}
        assert names == {"loss", *NOISY_METRICS}
        assert line["validation_blind_spot_error"] > SIGMA**2
        assert abs(line["validation_residual_mean"]) < 0.05
    report = read_report(run)
    assert {f"test_{name}" for name in (*METRICS, *NOISY_METRICS)} < set(report)
    assert report["test_psnr"] > 22


def test_the_model_is_that_of_the_lowest_blind_spot_error(run):
    lines = read_metrics(run)
    best = min(lines, key=lambda line: line["validation_blind_spot_error"])
    assert read_report(run)["epoch"] == best["epoch"]
    state = prepare(config_module.read(run / "config.json")).new_state()
    Checkpoints(run / "checkpoints", state).restore_best()
    assert int(state.step) == best["step"]
    assert all(map(np.array_equal, state.model.get_weights(), load_model(run).get_weights()))


def test_a_level_that_an_earlier_run_stated_is_not_taken_for_an_estimate(run, tmp_path):
    for name in ("config.json", "resolved.json"):
        (tmp_path / name).write_text((run / name).read_text())
    saved = config_module.read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(config_module.to_json(dataclasses.replace(saved, noise_level=0.2)))
    for flags, is_kept in (([], True), (["--noise-level", "None"], False)):
        arguments = cli.parse_config(cli.RunArguments, ["--config", str(tmp_path / "config.json"), *flags])
        assert bool(arguments.recorded.data_digest) == is_kept


def test_evaluation_adds_no_noise_and_claims_none(run, tmp_path):
    done = run_in_process("evaluate.py", run, "--figure", tmp_path / "a.png")
    assert f"{run} on pairs of noisy and clean images: " in done.stdout
    with pytest.raises(UsageError, match=r"^--noise-levels: no noise is added to the images of .* noisy already; add"):
        evaluated_config(run, EvaluateArguments((str(run),), noise_levels=(0.1, 0.5)))


def test_no_noise_is_added_and_values_are_not_clipped(folder, files):
    config = config_of(files, data=None, noisy=str(folder), loss="noise2void", validation_examples=10)
    task = prepare(config)
    (batch, *_) = task.batches("validation")
    np.testing.assert_array_equal(batch.noisy, batch.clean)
    assert float(tf.math.reduce_std(batch.noisy - 0.4)) > SIGMA
    (test, *_) = task.batches("test")
    assert float(tf.math.reduce_std(test.noisy - test.clean)) == pytest.approx(SIGMA, rel=0.05)


def test_noise_may_leave_the_value_range_but_another_range_is_rejected(tmp_path, files):
    rng = np.random.default_rng(0)
    for number in range(10):
        noisy = rng.uniform(size=(28, 28)) + 0.3 * rng.standard_normal((28, 28))
        tifffile.imwrite(tmp_path / f"{number}.tif", noisy.astype(np.float32))
    config = config_of(files, data=None, noisy=str(tmp_path), loss="noise2void", validation_examples=2)
    (batch, *_) = prepare(config).batches("validation")
    assert batch.noisy.numpy().min() < -0.1
    assert batch.noisy.numpy().max() > 1.1
    tifffile.imwrite(tmp_path / "0.tif", (255 * noisy).astype(np.float32))
    with pytest.raises(UsageError, match=r"--noisy: .*: train: values from .* --value-range -?\d+ \d+ fits"):
        prepare(config)


def test_a_single_picture_or_array_is_trained_and_tested_on_as_a_whole_whatever_its_name(folder, files, tmp_path):
    (tmp_path / "lone").mkdir()
    for name in ("clean.png", "lone/1.png"):
        (tmp_path / name).write_bytes((folder / "train" / "1.png").read_bytes())
    np.save(tmp_path / "stack.npy", np.stack([np.asarray(Image.open(folder / "train" / f"{n}.png")) for n in range(5)]))
    for name, count in {"clean.png": 1, "lone": 1, "stack.npy": 5}.items():
        splits = datasets.load(RunConfig(noisy=str(tmp_path / name)))
        assert [len(splits.train), len(splits.validation), len(splits.test)] == [count, 0, count]
        assert not splits.train.has_clean
        assert splits.notes[2].endswith(", those to train on")
    config = config_of(
        files, data=None, noisy=str(tmp_path / "clean.png"), loss="noise2void", validation_examples=0, epochs=2
    )
    report = trainer.train(config, tmp_path / "run", quiet=True)
    assert {f"test_{name}" for name in NOISY_METRICS} < set(report)
    assert not {f"test_{name}" for name in METRICS} & set(report)
    assert (tmp_path / "run" / "denoised.png").exists()


def test_correlation_of_the_residual_is_zero_for_white_noise_and_positive_for_structure():
    rng = np.random.default_rng(0)
    noise = tf.constant(rng.standard_normal((4, 64, 64, 1)), tf.float32)
    zeros = tf.zeros_like(noise)
    np.testing.assert_allclose(residual_correlation(zeros, noisy=noise), 0, atol=0.05)
    smooth = (noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1] + noise[:, :-1, :-1]) / 4
    np.testing.assert_allclose(residual_correlation(zeros[:, 1:, 1:], noisy=smooth), 0.5, atol=0.06)


def test_a_loss_that_needs_the_noise_level_uses_an_estimate_and_repeats_the_recorded_one(folder, files):
    config = config_of(files, data=None, noisy=str(folder), loss="sure", validation_examples=10, train_examples=40)
    task = prepare(config)
    assert any("noise: standard deviation 2" in note for note in task.data.notes)
    low, high = task.resolved.noise_level
    assert low == high == pytest.approx(SIGMA, rel=0.1)
    # The recorded level counts, not another estimate.
    recorded = dataclasses.replace(task.resolved, noise_level=(0.2, 0.2))
    assert prepare(config, recorded=recorded).data.train.noise_level == 0.2
    stated = prepare(dataclasses.replace(config, noise_level=0.05))
    assert stated.resolved.noise_level == (0.05, 0.05)
    (batch, *_) = stated.batches("validation")
    assert np.unique(batch.noise_level) == np.float32(0.05)


class SecondWorker(Replicas):
    """The second of two workers, of which the chief estimates another level; no network connects them."""

    def connect(self) -> None:
        pass

    def exchange(self, content: bytes) -> list[bytes]:
        return [b"0.12345", content]


def test_all_workers_use_the_estimate_of_the_chief(folder, files):
    config = config_of(files, data=None, noisy=str(folder), loss="noise2void", validation_examples=10)
    task = prepare(config, replicas=SecondWorker((), 1, ("a:1", "b:2")))
    assert task.resolved.noise_level == (0.12345, 0.12345)


def test_correlated_noise_is_warned_of(files, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = rng.standard_normal((97, 97))
        save(
            tmp_path / f"{number}.png", 0.5 + 0.05 * (noise[1:, 1:] + noise[1:, :-1] + noise[:-1, 1:] + noise[:-1, :-1])
        )
    prepare(config_of(files, data=None, noisy=str(tmp_path), loss="noise2void", validation_examples=1))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "correlated between pixels" in warning
    assert warning.startswith(f"warning: --noisy: {tmp_path}: ")


@pytest.mark.parametrize(("loss", "is_warned"), [("sure", True), ("recorrupted", False)])
def test_sure_for_a_network_that_is_not_bounded_gives_a_warning(loss, is_warned, folder, files, capsys):
    def linear(image_shape):
        noisy = keras.Input(image_shape)
        return keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same")(noisy))

    prepare(config_of(files, data=None, noisy=str(folder), loss=loss, model=linear, validation_examples=10))
    assert ("can fall without end" in capsys.readouterr().err) == is_warned
