import math

import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, new_state

from dae.config import RunConfig
from dae.training.train_state import RunningMeans


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
