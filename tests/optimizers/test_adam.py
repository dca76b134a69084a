import keras
import numpy as np
import pytest
from helpers import apply_gradients, random_values

from dae.optimizers.adam import Adam

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
