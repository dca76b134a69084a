import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dae.losses.losses import LOSSES

# Often exactly 0 or 1, where logarithms, roots and quotients can fail.
IMAGES = arrays(np.float32, (2, 12, 12, 1), elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))
LARGEST = {"bce": 16.2, "mse": 1, "mae": 1, "huber": 0.095, "charbonnier": 1.000001, "ssim": 2}
# Rounding error; that of SSIM is largest in flat bright images.
ROUNDING = {"ssim": 1e-4}


def values_and_gradients(loss, clean, denoised) -> tuple[tf.Tensor, tf.Tensor]:
    denoised = tf.constant(denoised)
    with tf.GradientTape() as tape:
        tape.watch(denoised)
        values = loss(tf.constant(clean), denoised)
    return values, tape.gradient(values, denoised)


@pytest.mark.parametrize("name", LOSSES)
@given(clean=IMAGES, denoised=IMAGES)
@settings(max_examples=30)
def test_losses_are_one_value_per_example_in_range_with_finite_gradients(name, clean, denoised):
    values, gradients = values_and_gradients(LOSSES[name], clean, denoised)
    assert values.shape == (2,)
    assert values.dtype == tf.float32
    assert values.numpy().min() >= -ROUNDING.get(name, 1e-6)
    assert values.numpy().max() <= LARGEST[name] * (1 + 1e-5)
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("clean", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("denoised", [0.0, 0.5, 1.0])
def test_losses_of_constant_images_are_least_where_the_images_are_equal(name, clean, denoised):
    images = [np.full((1, 28, 28, 1), value, np.float32) for value in (clean, denoised)]
    values, gradients = values_and_gradients(LOSSES[name], *images)
    least, _ = values_and_gradients(LOSSES[name], images[0], images[0])
    assert np.isfinite(gradients).all()
    assert values > least if clean != denoised else values == least
