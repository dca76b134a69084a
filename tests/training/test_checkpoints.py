"""Damaged, missing and outdated checkpoints, and those within an epoch."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import TINY, new_state

from dae.analysis.reproducibility import first_difference
from dae.errors import RunError
from dae.training import trainer
from dae.training.checkpoints import LATEST_KEPT, Checkpoints, saved_in

TWO_EPOCHS = replace(TINY, epochs=2)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the first two of TINY's three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    trainer.train(TWO_EPOCHS, folder, quiet=True)
    return folder


@pytest.fixture
def copy(two_epochs: Path, tmp_path: Path) -> Path:
    """A copy of `two_epochs`, to be damaged."""
    return shutil.copytree(two_epochs, tmp_path / "run")


def restored_step(folder: Path, model: keras.Model | None = None) -> int:
    """Return the step of the checkpoint that a resume would continue from."""
    state = new_state(model=model)
    assert Checkpoints(folder / "checkpoints", state).restore_latest()
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
def test_damaged_latest_checkpoint_is_named_and_the_one_before_restored(part, damage, copy, capsys):
    (file,) = (copy / "checkpoints" / "latest").glob(f"ckpt-20.{part}*")
    damage(file)
    assert restored_step(copy) == 10
    warning = capsys.readouterr().err
    for part_of_warning in ("latest/ckpt-20", "damaged", "skipped"):
        assert part_of_warning in warning
    assert steps(copy / "checkpoints" / "latest") == [10]
    assert not list((copy / "checkpoints").rglob("ckpt-20*"))


@pytest.mark.slow
def test_resume_from_before_a_damaged_checkpoint_gives_the_same_bits(copy, tiny_run):
    for folder in ("latest", "best"):
        (data,) = (copy / "checkpoints" / folder).glob("ckpt-20.data-*")
        flip_bit(0.5)(data)
    trainer.train(TINY, copy, resume=True, quiet=True)
    assert first_difference(copy, tiny_run) is None


def test_resume_without_an_intact_checkpoint_is_an_error(copy):
    for data in (copy / "checkpoints" / "latest").glob("*.data-*"):
        fill_with_zeros(data)
    report = (copy / "report.json").read_bytes()
    with pytest.raises(RunError, match=r"none of the checkpoints in .*latest"):
        trainer.train(TINY, copy, resume=True, quiet=True)
    assert (copy / "report.json").read_bytes() == report


@pytest.mark.parametrize("damage", [fill_with_zeros, Path.unlink])
def test_without_an_intact_best_checkpoint_the_latest_is_restored(damage, copy, capsys):
    (best,) = (copy / "checkpoints" / "best").glob("*.data-*")
    damage(best)
    state = new_state()
    checkpoints = Checkpoints(copy / "checkpoints", state)
    checkpoints.restore_best()
    assert int(state.step) == 20
    expected = new_state()
    assert Checkpoints(copy / "checkpoints", expected).restore_latest()
    for weight, expected_weight in zip(state.model.get_weights(), expected.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected_weight)
    assert "no intact checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_run_without_an_intact_best_checkpoint_keeps_the_last_epoch(copy, two_epochs, capsys):
    (copy / "report.json").unlink()
    (best,) = (copy / "checkpoints" / "best").glob("*.data-*")
    fill_with_zeros(best)
    report = trainer.train(TWO_EPOCHS, copy, resume=True, quiet=True)
    assert "no intact checkpoint" in capsys.readouterr().err
    # In this run the last epoch is the best as well.
    assert report == json.loads((two_epochs / "report.json").read_text())


def test_checkpoint_of_another_model_is_refused(copy, capsys):
    inputs = keras.Input((28, 28, 1))
    other = keras.Model(inputs, keras.layers.Conv2D(1, 5, padding="same", activation="sigmoid")(inputs))
    with pytest.raises(RunError, match="none of the checkpoints"):
        restored_step(copy, other)
    assert capsys.readouterr().err.count("skipped (") == 2
    assert steps(copy / "checkpoints" / "latest") == [10, 20]


def test_restore_from_an_empty_folder_changes_nothing(tmp_path):
    state = new_state()
    before = state.model.get_weights()
    assert not Checkpoints(tmp_path / "checkpoints", state).restore_latest()
    assert int(state.step) == 0
    for weight, expected in zip(state.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_only_the_latest_checkpoints_and_the_best_are_kept(tmp_path):
    state = new_state()
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
    state = new_state()
    checkpoints = Checkpoints(tmp_path, state)
    for step in (20, 100):
        state.step.assign(step)
        checkpoints.save()
    state.step.assign(0)
    checkpoints.restore_latest()
    assert int(state.step) == 100


def test_remains_of_a_killed_write_are_ignored_and_removed(copy):
    latest = copy / "checkpoints" / "latest"
    (data,) = latest.glob("ckpt-20.data-*")
    shutil.copy(data, latest / data.name.replace("ckpt-20", "ckpt-30"))  # its index was not written yet
    (latest / "ckpt-30_temp").mkdir()
    (latest / "ckpt-30_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"part")
    (latest / "ckpt-30.index.tempstate123").write_bytes(b"part")
    assert restored_step(copy) == 20
    assert not list(latest.glob("ckpt-30*"))


def test_later_best_checkpoint_than_the_restored_state_is_removed(copy):
    """The best checkpoint is written before the latest one; a kill between the two leaves it."""
    for path in (copy / "checkpoints" / "latest").glob("ckpt-20.*"):
        path.unlink()
    assert restored_step(copy) == 10
    assert steps(copy / "checkpoints" / "best") == []


@pytest.mark.slow
def test_checkpoints_within_an_epoch_change_no_result_and_can_be_resumed(tiny_run, tmp_path):
    trainer.train(replace(TINY, checkpoint_every=4), tmp_path / "run", quiet=True)
    assert first_difference(tmp_path / "run", tiny_run) is None
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert steps(latest) == [24, 28, 30]
    for path in latest.glob("ckpt-30.*"):
        path.unlink()  # as if killed in the last epoch
    (tmp_path / "run" / "report.json").unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    trainer.train(TINY, tmp_path / "moved", resume=True, quiet=True)
    assert first_difference(tmp_path / "moved", tiny_run) is None
