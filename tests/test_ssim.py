import numpy as np
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dae.ssim import ssim

SIDES = st.integers(11, 40)


@given(st.integers(1, 3), SIDES, SIDES, st.sampled_from([1, 3]), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_it_and_its_gradient_are_those_of_tensorflow(images, height, width, channels, contrast, seed):
    random = np.random.default_rng(seed)
    shape = (images, height, width, channels)
    clean = tf.constant(0.5 + contrast * (random.random(shape) - 0.5), tf.float32)
    denoised = tf.constant(np.clip(clean + random.normal(0, 0.2, shape), 0, 1), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(denoised)
        ours, theirs = ssim(clean, denoised), tf.image.ssim(clean, denoised, max_val=1.0)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    expected = tape.gradient(theirs, denoised).numpy()
    np.testing.assert_allclose(tape.gradient(ours, denoised), expected, atol=1e-3 * np.abs(expected).max())


@given(SIDES, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_equal_images_have_1(side, contrast, seed):
    image = tf.constant(contrast * np.random.default_rng(seed).random((1, side, side, 1)), tf.float32)
    np.testing.assert_allclose(ssim(image, image), 1, atol=1e-5)
