"""Tests of sums of losses, the names of their terms, and the parameters of a loss."""

import functools
import re
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.errors import UsageError
from dae.losses import composite
from dae.losses.losses import LOSSES


@pytest.fixture
def images(mnist) -> tuple[tf.Tensor, tf.Tensor]:
    """Clean and denoised images."""
    pixels = mnist.test.pixels[:8] / np.float32(255)
    return tf.constant(pixels[:4]), tf.constant(pixels[4:])


def test_sum_and_its_terms_have_their_values(images):
    values = composite.build("2*mae + 0.1*ssim + bce")(*images)
    assert list(values) == ["loss", "loss_mae", "loss_ssim", "loss_bce"]
    mae, ssim, bce = (LOSSES[name](*images).numpy() for name in ("mae", "ssim", "bce"))
    expected = {"loss": 2 * mae + 0.1 * ssim + bce, "loss_mae": mae, "loss_ssim": ssim, "loss_bce": bce}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)
    single = composite.build("2*mae")(*images)
    assert list(single) == ["loss"]
    np.testing.assert_allclose(single["loss"], 2 * mae, rtol=1e-6)


def test_terms_of_the_same_name_are_numbered(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("def bce(clean, denoised): ...\ndef total(clean, denoised): ...\n")
    names = composite.build(f"bce + {tmp_path}/a.py:bce + {tmp_path}/b.py:bce + {tmp_path}/b.py:total").names
    assert names == ("loss", "loss_bce", "loss_bce_2", "loss_bce_3", "loss_total_2")


def order_of(function: Callable) -> tuple[str, ...]:
    return composite.ImageFunction(function, "--loss: mine").images


def with_parameters(parameters: str) -> Callable:
    return eval(f"lambda {parameters}: ({re.sub('=[^,]*', '', parameters)})")


@pytest.mark.parametrize(
    "parameters",
    [
        "denoised, clean",
        "output, target",
        "input, target",
        "y_pred, y_true",
        "yPred, yTrue",
        "prediction, truth",
        "predictions, labels",
        "recon_x, x",
        "x_hat, x",
        "x, gt",
        "img, ground_truth",
        "outputs, images, scale=1",
        "clean_hat, clean",
        "fake, real",
    ],
)
def test_images_are_passed_by_the_names_of_parameters_in_either_order(parameters):
    first, second, *rest = parameters.split(", ")
    assert order_of(with_parameters(parameters)) == ("denoised", "clean")
    assert order_of(with_parameters(", ".join([second, first, *rest]))) == ("clean", "denoised")


@pytest.mark.parametrize("parameters", ["x, y", "a, b", "images1, images2", "clean, denoised"])
def test_unknown_names_are_clean_and_denoised_in_this_order(parameters):
    assert order_of(with_parameters(parameters)) == ("clean", "denoised")


@pytest.mark.parametrize(
    "parameters",
    ["clean, target", "output, y_pred", "input, output", "noisy_image, denoised", "lq, gt", "input, x", "x, clean_hat"],
)
def test_names_that_contradict_each_other_or_mean_the_noisy_image_are_rejected(parameters):
    message = rf"^--loss: mine: expected .*got \({parameters}\); the names do not tell which is which$"
    with pytest.raises(UsageError, match=message):
        order_of(with_parameters(parameters))


def test_a_single_parameter_is_the_prediction_under_any_of_its_names():
    assert order_of(with_parameters("y_pred")) == order_of(with_parameters("output")) == ("denoised",)
    for name in ("x", "input", "target", "noisy_image"):
        with pytest.raises(UsageError, match=rf"got \({name}\)$"):
            order_of(with_parameters(name))


def darker(output, target):
    """A loss that is not symmetric."""
    return tf.reduce_mean(tf.nn.relu(target - output), axis=[1, 2, 3])


def logged(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


@functools.wraps(darker)
def adapted(clean, denoised):
    return darker(denoised, clean)


class Darker(keras.Layer):
    def call(self, output, target, power=1):
        return darker(output, target) ** power

    def update(self, prediction, y):
        return darker(prediction, y)


def test_every_kind_of_function_gets_the_images_that_it_names(images):
    expected = darker(images[1], images[0]).numpy()
    assert not np.allclose(expected, darker(*images))
    layer = Darker()
    powered = functools.partial(lambda power, output, target: darker(output, target) ** power, 1)
    for function in (darker, tf.function(darker), logged(darker), adapted, powered, layer, layer.update):
        np.testing.assert_allclose(composite.ImageFunction(function, "")(*images), expected, err_msg=str(function))


def test_functions_that_hide_their_parameters_are_rejected_in_one_line():
    with pytest.raises(UsageError, match=r"^--loss: mine: expected \(clean, denoised\).*got \(\*images\)$"):
        order_of(lambda *images: images)
    with pytest.raises(UsageError, match=r"^--loss: mine: fails"):
        order_of(dict)
