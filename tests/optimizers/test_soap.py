import keras
import numpy as np
import pytest
from test_optimizers import moved, random_gradients

from dae.config import RunConfig
from dae.models import networks
from dae.optimizers import soap


def test_a_bias_moves_as_with_adam():
    gradients = random_gradients(0, 25, 8)
    ours, theirs = soap.Soap(0.01, beta_2=0.99), keras.optimizers.Adam(0.01, beta_2=0.99)
    np.testing.assert_allclose(moved(ours, gradients), moved(theirs, gradients), rtol=1e-5)


def test_a_kernel_moves_by_the_published_formulas():
    """In NumPy and float64, with signs of the eigenvectors of its own, on which nothing depends."""
    gradients = random_gradients(0, 25, 3, 2, 1, 6)
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
    ours = moved(soap.Soap(0.01, beta_2=0.99), gradients)
    np.testing.assert_allclose(ours.reshape(6, 6), weight, rtol=1e-3, atol=1e-5)


def test_a_long_side_keeps_its_axes():
    optimizer = soap.Soap()
    optimizer.build(networks.build(RunConfig(width=16), (28, 28, 1)).trainable_variables)
    sides = {variable.shape[0] for variable in optimizer.variables if variable.path.endswith("axes")}
    assert sides == {9, 128, 256}
    assert np.isfinite(moved(soap.Soap(0.01), random_gradients(0, 12, 3, 3, 128, 4))).all()


@pytest.mark.parametrize("step", [0, 7])
def test_without_any_gradient_nothing_moves(step):
    gradients = np.zeros((step + 1, 3, 3, 2, 4), np.float32)
    assert not moved(soap.Soap(0.01), gradients).any()
