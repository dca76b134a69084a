"""The state of training and its checkpoints: damaged ones, missing ones, those of another model, remains of a kill."""

import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, new_state

from dae.config import RunConfig
from dae.errors import RunError
from dae.training.checkpoints import LATEST_KEPT, Checkpoints, saved_in
from dae.training.train_state import RunningMeans, Stopwatch, TrainState


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
        ("data", flip_bit(0.9)),
        ("data", truncate),
        ("data", fill_with_zeros),
        ("data", Path.unlink),
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


def test_only_the_latest_checkpoints_and_the_best_are_kept(tmp_path):
    state = small_state()
    checkpoints = Checkpoints(tmp_path, state)
    for epoch, loss in enumerate([0.5, 0.3, 0.4, None, 0.3, 0.35], 1):
        state.step.assign(20 * epoch)
        checkpoints.save_epoch(epoch, loss)
    assert steps(tmp_path / "latest") == [80, 100, 120]
    assert len(steps(tmp_path / "latest")) == LATEST_KEPT
    assert steps(tmp_path / "best") == [40]  # the first epoch with the lowest loss
    for folder, count in (("latest", 3), ("best", 1)):
        assert len(list((tmp_path / folder).iterdir())) == 2 * count  # an index and a data file each
    checkpoints.restore_best()
    assert [int(state.step), int(state.best_epoch), float(state.best_value)] == [40, 2, 0.3]
    checkpoints.restore_latest()
    assert [int(state.step), int(state.best_epoch), float(state.best_value)] == [120, 2, 0.3]


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


def test_running_means_weigh_images():
    means = RunningMeans(["loss", "norm"])
    means.update({"norm": tf.constant(10.0), "loss": tf.constant(1.0)}, num_images=64)
    means.update({"norm": tf.constant(20.0), "loss": tf.constant(4.0)}, num_images=16)
    assert means.result() == {"loss": 1.6, "norm": 12.0}
    assert int(means.images) == 80


def test_running_means_are_exact_in_float64():
    means = RunningMeans(["loss"])
    for _ in range(1000):
        means.update({"loss": tf.constant(0.1)}, num_images=100)
    assert means.result()["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-13)


def test_memory_does_not_grow_with_the_updates_of_the_stopwatch():
    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    stopwatch = Stopwatch(new_state(TINY))
    for _ in range(1000):
        stopwatch.update()
    before = megabytes()
    for _ in range(2000):  # each took 0.7 kB when Python numbers were assigned
        stopwatch.update()
    assert megabytes() - before < 0.7


def test_training_stops_early_once_the_lowest_loss_is_as_old_as_the_patience():
    state = new_state(TINY)
    state.best_epoch.assign(3)
    assert [state.stops_early(epoch, 2) for epoch in (3, 4, 5, 6, 7)] == [False, False, False, True, True]
    assert not state.stops_early(100, None)


def test_start_epoch_resets_only_what_belongs_to_one_epoch():
    state = new_state(TINY)
    state.means.update({name: tf.constant(1.0) for name in ("loss", "gradient_norm", "update_to_weight_ratio")}, 2)
    for variable in (state.step, state.seconds, state.best_value, state.best_epoch):
        variable.assign(7)
    state.start_epoch()
    assert (state.means.sums.numpy() == 0).all()
    assert [int(value) for value in (state.means.images, state.seconds)] == [0, 0]
    assert [int(value) for value in (state.step, state.best_value, state.best_epoch)] == [7, 7, 7]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_checkpoint_holds_exactly_the_documented_tensors(optimizer, schedule, tmp_path):
    """Weights, the optimizer's variables, step, running means, seconds, and the best result, each once."""
    config = RunConfig(optimizer=optimizer, schedule=schedule, loss="bce + mse")
    state = new_state(config)
    state.write(str(tmp_path / "ckpt"))
    stored = {
        name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): tuple(shape)
        for name, shape in tf.train.list_variables(str(tmp_path / "ckpt"))
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"  # TensorFlow's description of the file
    }
    expected = {"step": (), "means/images": (), "seconds": (), "best_value": (), "best_epoch": ()}
    # The loss, its two terms, the norm of the gradient and the ratio of update to weights.
    assert expected | {"means/sums": (5,)} == {
        name: shape for name, shape in stored.items() if not name.startswith(("model/", "optimizer/"))
    }
    shapes = [tuple(variable.shape) for variable in (*state.model.variables, *state.optimizer.variables)]
    assert sorted(shape for name, shape in stored.items() if name.startswith(("model/", "optimizer/"))) == sorted(
        shapes
    )
    sizes = [math.prod(shape) for shape in shapes]
    parameters = state.model.count_params()
    if optimizer == "adam":  # the step, the rate unless a schedule computes it, and two moments
        assert sum(sizes) == 3 * parameters + 1 + (schedule == "constant")
    else:
        assert sum(sizes) > 3 * parameters
