import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import apply_gradients, random_values

from dae.optimizers.adam import Adam, flatten

SHAPES = [(3, 3, 2, 4), (4,), (8,), (5, 7), (3, 3, 4, 1)]
SCALES = [1.0, 1e-4, 100.0, 0.1, 10.0]
STEPS = 50


@pytest.mark.parametrize(
    "rate", [0.01, keras.optimizers.schedules.CosineDecay(0.01, STEPS)], ids=["constant", "cosine"]
)
@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES], ids=["one weight", "several weights"])
def test_adam_equals_the_adam_of_keras(shapes, rate):
    starts = [random_values(index, *shape) for index, shape in enumerate(shapes)]
    gradients = [
        scale * random_values(100 + index, STEPS, *shape)
        for index, (shape, scale) in enumerate(zip(shapes, SCALES, strict=False))
    ]
    ours = apply_gradients(Adam(rate, beta_1=0.8, beta_2=0.99, epsilon=1e-6), starts, gradients)
    expected = apply_gradients(keras.optimizers.Adam(rate, beta_1=0.8, beta_2=0.99, epsilon=1e-6), starts, gradients)
    for start, weight, expected_weight in zip(starts, ours, expected, strict=True):
        assert weight.shape == start.shape
        np.testing.assert_allclose(weight - start, expected_weight - start, rtol=1e-4, atol=1e-6)
        assert np.abs(weight - start).min() > 1e-5


def test_adam_within_a_graph_equals_adam_without():
    starts, gradients = (
        [random_values(0, *shape) for shape in SHAPES],
        [random_values(1, 5, *shape) for shape in SHAPES],
    )
    expected = apply_gradients(Adam(0.01), starts, gradients)
    optimizer = Adam(0.01)
    weights = [keras.Variable(start) for start in starts]
    optimizer.build(weights)
    apply = tf.function(lambda *step_gradients: optimizer.apply(list(step_gradients), weights))
    for step_gradients in zip(*gradients, strict=True):
        apply(*map(tf.constant, step_gradients))
    assert int(optimizer.iterations) == 5
    for weight, expected_weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-6)


def test_adam_moments_hold_one_value_for_each_weight():
    optimizer = Adam()
    optimizer.build([keras.Variable(np.zeros(shape)) for shape in SHAPES])
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    assert optimizer.momentum.shape == optimizer.velocity.shape == (size,)


def test_adam_rejects_a_different_number_of_weights_than_it_was_built_with():
    optimizer = Adam()
    optimizer.build([keras.Variable(np.zeros(2)), keras.Variable(np.zeros(2))])
    with pytest.raises(ValueError, match="zip"):
        optimizer.apply([tf.zeros(2), tf.zeros(2)], [keras.Variable(np.zeros(2))])


def test_flatten_keeps_the_order_of_tensors_and_values():
    tensors = [tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant(5.0), tf.constant([6.0])]
    np.testing.assert_array_equal(flatten(tensors), [1, 2, 3, 4, 5, 6])
