import keras
import numpy as np
import pytest
from helpers import apply_gradients, random_values

from dae.config import RunConfig
from dae.models import networks
from dae.optimizers import soap


def apply_from_zero(optimizer: keras.optimizers.Optimizer, gradients: np.ndarray) -> np.ndarray:
    """Return where gradients [steps, ...] take a weight that starts at 0."""
    (weight,) = apply_gradients(optimizer, [np.zeros_like(gradients[0])], [gradients])
    return weight


@pytest.mark.parametrize("shape", [(8,), (1,), ()])
def test_soap_updates_biases_and_single_numbers_as_adam(shape):
    gradients = random_values(0, 25, *shape)
    expected = apply_from_zero(keras.optimizers.Adam(0.01, beta_2=0.99), gradients)
    np.testing.assert_allclose(apply_from_zero(soap.Soap(0.01, beta_2=0.99), gradients), expected, rtol=1e-5)


def test_soap_updates_kernels_by_the_published_formulas():
    """The reference is NumPy in float64; the signs of its eigenvectors differ, on which nothing depends."""
    gradients = random_values(0, 25, 3, 2, 1, 6)
    first, second, left, right, weight = (np.zeros((6, 6)) for _ in range(5))
    rows = columns = np.eye(6)
    for step, gradient in enumerate(gradients.reshape(25, 6, 6).astype(np.float64), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * (rows.T @ gradient @ columns) ** 2
        mean, size = first / (1 - 0.9**step), np.sqrt(second / (1 - 0.99**step))
        weight -= 0.01 * rows @ ((rows.T @ mean @ columns) / size) @ columns.T
        left, right = 0.95 * left + 0.05 * gradient @ gradient.T, 0.95 * right + 0.05 * gradient.T @ gradient
        if step % 10 == 0:
            rows, columns = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    ours = apply_from_zero(soap.Soap(0.01, beta_2=0.99), gradients)
    np.testing.assert_allclose(ours.reshape(6, 6), weight, rtol=1e-3, atol=1e-5)


def test_soap_updates_each_of_several_weights_as_if_it_were_alone():
    shapes = [(3, 3, 2, 4), (4,), (3, 3, 4, 1), (1,)]
    starts, gradients = (
        [random_values(0, *shape) for shape in shapes],
        [random_values(1, 12, *shape) for shape in shapes],
    )
    together = apply_gradients(soap.Soap(0.01), starts, gradients)
    for index, weight in enumerate(together):
        (alone,) = apply_gradients(soap.Soap(0.01), [starts[index]], [gradients[index]])
        np.testing.assert_allclose(weight, alone, rtol=1e-6)


def test_soap_does_not_precondition_long_sides():
    optimizer = soap.Soap()
    optimizer.build(networks.build(RunConfig(width=16), (28, 28, 1)).trainable_variables)
    sides = {variable.shape[0] for variable in optimizer.variables if variable.path.endswith("_Q")}
    assert sides == {9, 128, 256}
    assert np.isfinite(apply_from_zero(soap.Soap(0.01), random_values(0, 12, 3, 3, 128, 4))).all()


@pytest.mark.parametrize("steps", [1, 8])
def test_soap_without_a_gradient_keeps_the_weights(steps):
    assert not apply_from_zero(soap.Soap(0.01), np.zeros((steps, 3, 3, 2, 4), np.float32)).any()
