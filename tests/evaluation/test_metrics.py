import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.evaluation.metrics import METRICS, bce
from dae.losses.losses import LOSSES


@pytest.fixture(scope="module")
def digits(mnist) -> tuple[np.ndarray, np.ndarray]:
    """Clean and denoised images."""
    clean = (mnist.test[:50] / 255).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    # Values short of 0 and 1, as of a sigmoid: beyond them, Keras clips before it takes the logarithm.
    denoised = np.clip(clean + noise, 0.001, 0.999).astype(np.float32)
    return clean, denoised


def test_losses_and_metrics_equal_their_formulas(digits):
    clean, denoised = (array.astype(np.float64).reshape(50, -1) for array in digits)
    error = clean - denoised
    squared = (error**2).mean(axis=1)
    expected = {
        "bce": -(clean * np.log(denoised) + (1 - clean) * np.log(1 - denoised)).mean(axis=1),
        "mse": squared,
        "mae": np.abs(error).mean(axis=1),
        "huber": np.where(np.abs(error) <= 0.1, error**2 / 2, 0.1 * (np.abs(error) - 0.05)).mean(axis=1),
        "charbonnier": np.sqrt(error**2 + 1e-6).mean(axis=1),
        "psnr": -10 * np.log10(squared),
        "accuracy": (clean == (denoised > 0.5)).mean(axis=1),
    }
    for name, values in expected.items():
        function = (LOSSES | METRICS)[name]
        np.testing.assert_allclose(function(*map(tf.constant, digits)), values, rtol=1e-4, err_msg=name)


def test_psnr_and_ssim_of_known_images(digits):
    clean = tf.constant(digits[0])
    np.testing.assert_allclose(METRICS["ssim"](clean, clean), 1, atol=1e-6)
    np.testing.assert_allclose(LOSSES["ssim"](clean, digits[1]), 1 - METRICS["ssim"](clean, digits[1]), atol=1e-6)
    grey = tf.fill(clean.shape, 0.5)
    np.testing.assert_allclose(METRICS["psnr"](grey, grey + 0.1), 20, rtol=1e-4)


def test_bce_of_clean_test_images_has_its_known_lower_bound(mnist):
    clean = tf.constant((mnist.test / 255).astype(np.float32))
    assert float(tf.reduce_mean(bce(clean, clean))) == pytest.approx(0.0581, abs=5e-5)
    np.testing.assert_allclose(METRICS["bce_excess"](clean[:50], clean[:50]), 0, atol=1e-6)


def test_accuracy_equals_that_of_keras(digits):
    clean, denoised = digits
    inputs = keras.Input((28, 28, 1))
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss="binary_crossentropy", metrics=["accuracy"])
    accuracy = model.evaluate(denoised, clean, verbose=0, return_dict=True)["accuracy"]
    assert float(tf.reduce_mean(METRICS["accuracy"](clean, denoised))) == pytest.approx(accuracy, rel=1e-5)
