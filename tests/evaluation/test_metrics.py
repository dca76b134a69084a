from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import batch_of, objective, rejected

from dae.config import RunConfig
from dae.errors import UsageError
from dae.evaluation.evaluate import make_evaluator
from dae.evaluation.metrics import METRICS, bce, check, format_metrics, load, psnr_of_mse
from dae.losses.composite import ImageFunction
from dae.losses.losses import LOSSES


@pytest.fixture(scope="module")
def digits(mnist) -> tuple[np.ndarray, np.ndarray]:
    """Clean and denoised images."""
    clean = (mnist.test.pixels[:50] / 255).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    # Values short of 0 and 1, as of a sigmoid: beyond them, Keras clips before it takes the logarithm.
    denoised = np.clip(clean + noise, 0.001, 0.999).astype(np.float32)
    return clean, denoised


def test_losses_and_metrics_equal_their_formulas(digits):
    clean, denoised = (array.astype(np.float64) for array in digits)
    error, pixels = clean - denoised, (1, 2, 3)
    squared = (error**2).mean(pixels)
    gradients = np.abs(np.diff(error, axis=1)).sum(pixels) + np.abs(np.diff(error, axis=2)).sum(pixels)
    clean_waves, denoised_waves = (np.abs(np.fft.rfft2(images, axes=(1, 2), norm="ortho")) for images in digits)
    expected = {
        "bce": -(clean * np.log(denoised) + (1 - clean) * np.log(1 - denoised)).mean(pixels),
        "mse": squared,
        "mae": np.abs(error).mean(pixels),
        "huber": np.where(np.abs(error) <= 0.1, error**2 / 2, 0.1 * (np.abs(error) - 0.05)).mean(pixels),
        "charbonnier": np.sqrt(error**2 + 1e-6).mean(pixels),
        "edges": gradients / (2 * 28 * 28),
        "frequency": np.abs(clean_waves - denoised_waves).mean(pixels),
        "psnr": -10 * np.log10(squared),
        "accuracy": (clean == (denoised > 0.5)).mean(pixels),
        "ssim": 1 - METRICS["ssim"](*map(tf.constant, digits)).numpy(),  # itself compared with the formulas
    }
    for name, values in expected.items():
        function = (METRICS | LOSSES)[name]
        np.testing.assert_allclose(function(*map(tf.constant, digits)), values, rtol=1e-4, err_msg=name)


def test_bce_of_clean_test_images_has_its_known_lower_bound(mnist):
    clean = tf.constant((mnist.test.pixels / 255).astype(np.float32))
    assert float(tf.reduce_mean(bce(clean, clean))) == pytest.approx(0.0581, abs=5e-5)
    np.testing.assert_allclose(METRICS["bce_excess"](clean[:50], clean[:50]), 0, atol=1e-6)


PLUGIN = """
import numpy as np
import tensorflow as tf

def largest_error(clean, denoised):
    return tf.reduce_max(tf.abs(clean - denoised), axis=[1, 2, 3])

def mean(clean, denoised):
    return tf.reduce_mean(tf.abs(clean - denoised))

def numpy(clean, denoised):
    return tf.constant(np.abs(clean.numpy() - denoised.numpy()).max((1, 2, 3)))

def infinite(clean, denoised):
    return tf.concat([[0.5, np.inf], tf.zeros(len(clean) - 2)], axis=0)

def psnr(clean, denoised):
    return largest_error(clean, denoised)

def loss_bce(clean, denoised):
    return largest_error(clean, denoised)

def fails(clean, denoised):
    return clean.none

def darker(output, target):
    return tf.reduce_mean(tf.nn.relu(target - output), axis=[1, 2, 3])

def brightness(output):
    return tf.reduce_mean(output, axis=[1, 2, 3])

def asks(clean, denoised, *, sigma):
    return largest_error(clean, denoised)

def removed_noise(denoised, *, noisy):
    return tf.reduce_mean(tf.abs(denoised - noisy), axis=[1, 2, 3])
"""


@pytest.fixture
def plugin(tmp_path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def load_and_check(config: RunConfig, digits: tuple[np.ndarray, np.ndarray]) -> dict[str, ImageFunction]:
    """Return the metrics of a run whose network returns the noisy images."""
    functions = load(config)
    image = keras.Input((28, 28, 1))
    model = keras.Model(image, keras.layers.Activation("linear")(image))
    check(functions, objective(), model, batch_of(*reversed(digits)))
    return functions


def test_metrics_can_ask_for_the_inputs_of_losses_and_get_clipped_images(plugin, digits):
    functions = load_and_check(RunConfig(metrics=(f"{plugin}:removed_noise",)), digits)
    image = keras.Input((28, 28, 1))
    twice = keras.Model(image, keras.layers.Rescaling(2.0)(image))
    means = make_evaluator(twice, objective("mse"), functions)("test", [batch := batch_of(*reversed(digits))])
    expected = np.abs(np.minimum(2 * batch.noisy, 1) - batch.noisy).mean()
    assert means["test_removed_noise"] == pytest.approx(expected, rel=1e-5)
    assert means["test_loss"] == pytest.approx(float(np.mean((2 * batch.noisy - batch.clean) ** 2)), rel=1e-5)
    assert means["test_mse"] < means["test_loss"]


def test_metrics_of_a_users_file_follow_those_of_the_package_and_get_the_images_that_they_name(plugin, digits):
    functions = load(RunConfig(metrics=(f"{plugin}:darker", f"{plugin}:brightness")))
    assert list(functions) == [*METRICS, "darker", "brightness"]
    clean, denoised = digits
    expected = np.maximum(clean - denoised, 0).mean((1, 2, 3))
    np.testing.assert_allclose(functions["darker"](tf.constant(clean), tf.constant(denoised)), expected, rtol=1e-5)
    np.testing.assert_allclose(functions["brightness"](clean, tf.constant(denoised)), denoised.mean((1, 2, 3)), 1e-5)


def test_a_perfect_image_makes_the_mean_psnr_infinite_but_not_that_of_the_mean_error(digits):
    clean, denoised = digits
    denoised = np.concatenate([clean[:1], denoised[1:]])
    assert np.isinf(np.mean(METRICS["psnr"](clean, denoised)))
    mse = float(np.mean((clean.astype(np.float64) - denoised) ** 2))
    assert psnr_of_mse(mse) == pytest.approx(-10 * np.log10(mse))
    assert psnr_of_mse(0.0) == np.inf
    means = dict.fromkeys(("test_bce", "test_bce_excess", "test_ssim"), 0.5) | {"test_mse": mse, "test_psnr": np.inf}
    assert f"PSNR inf dB ({-10 * np.log10(mse):.2f} dB of the mean MSE)" in format_metrics(means)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("mean", ["expected a tensor, float32 [50], one value per image, got float32 []"]),
        ("numpy", ["fails in line 12 (", "'numpy'"]),
        ("infinite", ["expected finite values, got inf"]),
        ("psnr", ["the name 'psnr' is taken"]),
        ("loss_bce", ["the name 'loss_bce' is taken"]),
        ("fails", ["fails in line 24 (", "'none'"]),
        ("asks", ["unknown input 'sigma' (known: noisy, second_noisy"]),
    ],
)
def test_metric_that_cannot_be_used_is_rejected_in_one_line(function, words, plugin, digits):
    with rejected(f"--metrics: {plugin}:{function}: ", *words):
        load_and_check(RunConfig(metrics=(f"{plugin}:{function}",)), digits)


def test_two_metrics_of_one_name_are_rejected(plugin, tmp_path, digits):
    (tmp_path / "other.py").write_text(PLUGIN)
    metrics = tuple(f"{tmp_path}/{name}.py:largest_error" for name in ("mine", "other"))
    with pytest.raises(UsageError, match="the name 'largest_error' is taken"):
        load(RunConfig(metrics=metrics))
