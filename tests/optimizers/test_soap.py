import keras
import numpy as np
import pytest
from helpers import apply_gradients, random_values

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
    gradients = random_values(0, 25, 2, 1, 3, 4)
    first, second, weight = (np.zeros((2, 3, 4)) for _ in range(3))
    moments, bases = [np.zeros((n, n)) for n in (2, 3, 4)], [np.eye(n) for n in (2, 3, 4)]
    for step, gradient in enumerate(gradients.reshape(25, 2, 3, 4).astype(np.float64), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * np.einsum("aio,ab,ij,op->bjp", gradient, *bases) ** 2
        mean, size = first / (1 - 0.9**step), np.sqrt(second / (1 - 0.99**step))
        update = np.einsum("aio,ab,ij,op->bjp", mean, *bases) / size
        weight -= 0.01 * np.einsum("bjp,ab,ij,op->aio", update, *bases)
        for axis, moment in enumerate(moments):
            matrix = np.moveaxis(gradient, axis, 0).reshape(len(moment), -1)
            moment += 0.05 * (matrix @ matrix.T - moment)
        if step % 10 == 0:
            bases = [np.linalg.eigh(moment)[1] for moment in moments]
    ours = apply_from_zero(soap.Soap(0.01, beta_2=0.99), gradients)
    np.testing.assert_allclose(ours.reshape(2, 3, 4), weight, rtol=1e-3, atol=1e-5)


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


def test_soap_preconditions_the_window_and_the_channels_but_no_long_axes():
    optimizer = soap.Soap()
    optimizer.build([keras.Variable(np.zeros(shape)) for shape in ((3, 3, 1, 16), (301, 8), (2, 2, 300, 301), (7,))])
    lengths = [variable.shape[0] for variable in optimizer.variables if variable.path.endswith("_Q")]
    assert lengths == [9, 16, 8, 4, 300]


@pytest.mark.parametrize("steps", [1, 8])
def test_soap_without_a_gradient_keeps_the_weights(steps):
    assert not apply_from_zero(soap.Soap(0.01), np.zeros((steps, 3, 3, 2, 4), np.float32)).any()
