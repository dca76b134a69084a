"""Damaged, missing and outdated checkpoints, and those within an epoch."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import new_state
from runs import config_of

from dae.analysis.reproducibility import first_difference
from dae.errors import RunError
from dae.training import trainer
from dae.training.checkpoints import LATEST_KEPT, Checkpoints, saved_in
from dae.training.train_state import TrainState
from dae.workdir.workdir import read_report


def small_state(size: int = 3) -> TrainState:
    """Return the state of a network of one layer, with random weights."""
    inputs = keras.Input((28, 28, 1))
    outputs = keras.layers.Conv2D(1, size, padding="same", activation="sigmoid")(inputs)
    return new_state(model=keras.Model(inputs, outputs))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with checkpoints of the steps 10 and 20, and the latter as the best."""
    state = small_state()
    checkpoints = Checkpoints(tmp_path, state)
    for epoch in (1, 2):
        state.step.assign(10 * epoch)
        state.model.layers[1].bias.assign([epoch])
        checkpoints.save_epoch(epoch, 1 / epoch)
    return tmp_path


def restored_step(folder: Path, state: TrainState | None = None) -> int:
    """Return the step of the checkpoint that a resume would continue from."""
    state = state or small_state()
    Checkpoints(folder, state).restore_latest()
    return int(state.step)


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, the latest last."""
    return [int(prefix.name.removeprefix("ckpt-")) for prefix in saved_in(folder)]


def flip_bit(at: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * len(content))] ^= 1
        file.write_bytes(content)

    return damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("data", flip_bit(0.1)),
        ("data", flip_bit(0.9)),
        ("data", truncate),
        ("data", fill_with_zeros),
        ("data", Path.unlink),
        ("index", flip_bit(0.1)),
        ("index", flip_bit(0.6)),
        ("index", truncate),
        ("index", fill_with_zeros),
    ],
)
def test_damaged_latest_checkpoint_is_named_and_the_one_before_restored(part, damage, folder, capsys):
    (file,) = (folder / "latest").glob(f"ckpt-20.{part}*")
    damage(file)
    assert restored_step(folder) == 10
    warning = capsys.readouterr().err
    for words in ("latest/ckpt-20", "damaged", "skipped"):
        assert words in warning
    assert steps(folder / "latest") == [10]
    assert not list(folder.rglob("ckpt-20*"))


def test_without_an_intact_checkpoint_nothing_is_resumed(folder):
    for data in (folder / "latest").glob("*.data-*"):
        fill_with_zeros(data)
    with pytest.raises(RunError, match=r"none of the checkpoints in .*latest"):
        restored_step(folder)
    assert steps(folder / "latest") == [10, 20]


@pytest.mark.parametrize("damage", [fill_with_zeros, Path.unlink])
def test_without_an_intact_best_checkpoint_the_latest_is_restored(damage, folder, capsys):
    (best,) = (folder / "best").glob("*.data-*")
    damage(best)
    state = small_state()
    Checkpoints(folder, state).restore_best()
    assert int(state.step) == 20
    assert state.model.layers[1].bias.numpy() == [2]
    assert "no intact checkpoint" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_rejected(folder, capsys):
    with pytest.raises(RunError, match="none of the checkpoints"):
        restored_step(folder, small_state(size=5))
    assert capsys.readouterr().err.count("skipped (") == 2
    assert steps(folder / "latest") == [10, 20]


def test_restore_from_an_empty_folder_changes_nothing(tmp_path):
    state = small_state()
    before = state.model.get_weights()
    Checkpoints(tmp_path / "checkpoints", state).restore_latest()
    assert int(state.step) == 0
    for weight, expected in zip(state.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_only_the_latest_checkpoints_and_the_best_are_kept(tmp_path):
    state = small_state()
    checkpoints = Checkpoints(tmp_path, state)
    for epoch, loss in enumerate([0.5, 0.3, 0.4, None, 0.3, 0.35], 1):
        state.step.assign(10 * epoch)
        checkpoints.save_epoch(epoch, loss)
    assert steps(tmp_path / "latest") == [40, 50, 60]
    assert len(steps(tmp_path / "latest")) == LATEST_KEPT
    assert steps(tmp_path / "best") == [20]  # the first epoch with the lowest loss
    for folder, count in (("latest", 3), ("best", 1)):
        assert len(list((tmp_path / folder).iterdir())) == 2 * count  # an index and a data file each
    checkpoints.restore_best()
    assert [int(state.step), int(state.best_epoch), float(state.best_loss)] == [20, 2, 0.3]
    checkpoints.restore_latest()
    assert [int(state.step), int(state.best_epoch), float(state.best_loss)] == [60, 2, 0.3]


def test_checkpoints_of_100_steps_are_newer_than_those_of_20(tmp_path):
    state = small_state()
    checkpoints = Checkpoints(tmp_path, state)
    for step in (20, 100):
        state.step.assign(step)
        checkpoints.save()
    state.step.assign(0)
    checkpoints.restore_latest()
    assert int(state.step) == 100


def test_remains_of_a_killed_write_are_ignored_and_removed(folder):
    latest = folder / "latest"
    (data,) = latest.glob("ckpt-20.data-*")
    shutil.copy(data, latest / data.name.replace("ckpt-20", "ckpt-30"))  # its index was not written yet
    (latest / "ckpt-30_temp").mkdir()
    (latest / "ckpt-30_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"part")
    (latest / "ckpt-30.index.tempstate123").write_bytes(b"part")
    assert restored_step(folder) == 20
    assert not list(latest.glob("ckpt-30*"))


def test_later_best_checkpoint_than_the_restored_state_is_removed(folder):
    """The best checkpoint is written before the latest one; a kill between the two leaves it."""
    for path in (folder / "latest").glob("ckpt-20.*"):
        path.unlink()
    assert restored_step(folder) == 10
    assert steps(folder / "best") == []


@pytest.mark.slow
def test_resume_from_before_a_damaged_checkpoint_gives_the_same_bits(finished_run, files, tmp_path):
    """In another folder than that in which the run was started."""
    run = Path(shutil.copytree(finished_run("sum"), tmp_path / "moved"))
    (data,) = (run / "checkpoints" / "latest").glob("ckpt-14.data-*")
    flip_bit(0.5)(data)
    (run / "report.json").unlink()
    trainer.train(config_of(files, "sum"), run, resume=True, quiet=True)
    assert first_difference(run, finished_run("sum")) is None


@pytest.mark.slow
def test_run_without_an_intact_best_checkpoint_keeps_the_last_epoch(finished_run, files, tmp_path, capsys):
    run = Path(shutil.copytree(finished_run("sum"), tmp_path / "run"))
    assert read_report(run)["epoch"] == 1
    (run / "report.json").unlink()
    (best,) = (run / "checkpoints" / "best").glob("*.data-*")
    fill_with_zeros(best)
    assert trainer.train(config_of(files, "sum"), run, resume=True, quiet=True)["epoch"] == 2
    assert "no intact checkpoint" in capsys.readouterr().err
