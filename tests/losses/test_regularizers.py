import numpy as np
import pytest
import tensorflow as tf

from dae.losses.losses import contractive, sparse_latents

COPIES, SEEDS = 400, 3


@pytest.mark.parametrize("activation", [tf.identity, tf.tanh])
def test_contractive_is_an_unbiased_estimate_of_the_squared_norm_of_the_jacobian(activation, mnist):
    images = tf.constant(mnist.test.pixels[:2, ::4, ::4] / np.float32(255))
    matrix = tf.constant(np.random.default_rng(0).normal(0, 0.5, (49, 6)), tf.float32)

    def encode(noisy):
        return tf.reshape(activation(tf.reshape(noisy, [-1, 49]) @ matrix), [-1, 1, 2, 3])

    with tf.GradientTape() as tape:
        tape.watch(images)
        latents = encode(images)
    jacobian = tape.batch_jacobian(latents, images).numpy()
    expected = np.square(jacobian).sum((1, 2, 3, 4, 5, 6)) / 6
    # Each copy of an image has its own probe.
    copies = tf.repeat(images, COPIES, axis=0)
    estimates = [
        contractive(noisy=copies, encode=encode, seed=tf.constant([seed, 7], tf.int64)) for seed in range(SEEDS)
    ]
    values = np.stack(estimates, axis=1).reshape(2, COPIES * SEEDS)
    standard_errors = values.std(axis=1) / (COPIES * SEEDS) ** 0.5
    assert (standard_errors < 0.06 * expected).all()
    assert (np.abs(values.mean(axis=1) - expected) < 4 * standard_errors).all()


def test_contractive_is_a_function_of_the_seed_and_has_a_gradient_with_respect_to_the_encoder():
    images, scale = tf.constant(np.random.default_rng(0).random((1, 7, 7, 1)), tf.float32), tf.Variable(3.0)

    def value(seed):
        return contractive(noisy=images, encode=lambda x: scale * tf.square(x), seed=tf.constant([0, seed], tf.int64))

    with tf.GradientTape() as tape:
        first = value(1)
    # |s v|^2 / n is quadratic in s.
    assert float(tape.gradient(first, scale)) == pytest.approx(2 * float(first[0]) / 3, rel=1e-5)
    assert value(1).numpy() == first.numpy() != value(2).numpy()


@pytest.mark.parametrize("shape", [(3, 4, 4, 8), (3, 10)])
def test_sparse_latents_is_the_mean_magnitude_of_each_images_latents(shape):
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = np.abs(latents).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(sparse_latents(latents=tf.constant(latents)), expected, rtol=1e-5)
