import math
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

from dae.analysis import reproducibility
from dae.config import RunConfig
from dae.errors import UsageError
from dae.optimizers import optimizers
from dae.training import trainer
from dae.workdir.workdir import read_metrics

# 13 steps in an epoch, between two choices of SOAP's axes.
COSINE = replace(TINY, batch_size=48, optimizer="soap", schedule="cosine", warmup_ratio=0.26)


def test_the_rate_rises_to_its_highest_and_falls_to_nothing_along_a_cosine():
    config = RunConfig(learning_rate=0.01, schedule="cosine", warmup_ratio=0.091)
    rate = optimizers.build(config, 110)._learning_rate
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.005, 0.01])
    for step in (20, 60, 100, 110):
        expected = 0.01 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-8)


def test_a_resumed_run_with_a_schedule_equals_an_uninterrupted_one(tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    trainer.train(COSINE, tmp_path / "peace")
    with pytest.raises(Stop):
        trainer.train(COSINE, tmp_path / "stopped", after_epoch=stop)
    trainer.train(COSINE, tmp_path / "stopped", resume=True)
    assert reproducibility.first_difference(tmp_path / "peace", tmp_path / "stopped") is None
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "peace")]
    expected = [1e-3 * (1 + math.cos(math.pi * (step - 10) / 29)) / 2 for step in (13, 26, 39)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_more_epochs_of_a_schedule_are_refused(tmp_path):
    trainer.train(COSINE, tmp_path / "run")
    with pytest.raises(UsageError, match="--epochs was 3, now 4"):
        trainer.train(replace(COSINE, epochs=4), tmp_path / "run", resume=True)


def moved(optimizer: keras.optimizers.Optimizer, gradients: np.ndarray) -> np.ndarray:
    """Where `optimizer` takes a weight that is 0 and has these gradients [steps, ...], one after the other."""
    weight = keras.Variable(np.zeros_like(gradients[0]))
    optimizer.build([weight])
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)])
    return weight.numpy()


def random_gradients(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(8,), (3, 3, 2, 4)])
def test_adam_moves_weights_as_that_of_keras(shape):
    gradients = random_gradients(0, 50, *shape)
    expected = moved(keras.optimizers.Adam(0.01, beta_2=0.99), gradients)
    np.testing.assert_allclose(moved(optimizers.Adam(0.01, beta_2=0.99), gradients), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("gradient", "applied"), [([0.3, 0.0], [0.3, 0.0]), ([3.0, 4.0], [0.3, 0.4])])
def test_a_gradient_of_a_larger_norm_is_scaled_down_to_it(gradient, applied):
    optimizer = optimizers.build(RunConfig(max_gradient_norm=0.5), 10)
    optimizer.apply([tf.constant(gradient)], [tf.Variable([0.0, 0.0])])
    (momentum,) = (variable for variable in optimizer.variables if "momentum" in variable.path)
    np.testing.assert_allclose(momentum, 0.1 * np.array(applied), rtol=1e-6)  # Adam's beta_1 is 0.9
