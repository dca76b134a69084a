"""Metrics of denoised images: functions `(clean, denoised) -> value [batch]`, like losses.

Denoised images are clipped to [0, 1], unlike those that a loss gets.
"""

import functools
import math
from collections.abc import Mapping

import keras
import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.data.pipeline import Batch
from dae.errors import UsageError
from dae.losses.composite import ImageFunction
from dae.losses.contract import check_finite, check_per_image
from dae.losses.losses import bce, mse
from dae.losses.objective import Objective
from dae.losses.self_supervised import Denoise, masked_error
from dae.losses.ssim import ssim
from dae.models.fused_layers import fused


def psnr(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Peak signal-to-noise ratio of each image, -10 log10(MSE), in dB; infinite for equal images.

    Source: `tf.image.psnr` with max_val 1.
    """
    return tf.image.psnr(clean, denoised, max_val=1.0)


def psnr_of_mse(mse: float) -> float:
    """Return -10 log10(mse), in dB, of a mean squared error over images in [0, 1]; infinite for 0.

    Unlike the mean PSNR, that of the mean error is not decided by a few images that are (nearly) perfect.
    """
    return -10 * math.log10(mse) if mse else math.inf


def bce_excess(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """BCE above its lower bound, the entropy of the clean pixels: bce(x, y) - bce(x, x), in nats per pixel, >= 0."""
    return bce(clean, denoised) - bce(clean, clean)


def accuracy(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Fraction of pixels whose denoised value, rounded at 0.5, equals the clean one exactly; grey pixels never do.

    Source: Keras's `accuracy` for such a network, which the tutorial prints.
    """
    return tf.reduce_mean(keras.metrics.binary_accuracy(clean, denoised), axis=[1, 2, 3])


METRICS: dict[str, ImageFunction] = {
    function.__name__: ImageFunction(function, function.__name__)
    for function in (bce, bce_excess, mse, psnr, ssim, accuracy)
}


def blind_spot_error(*, noisy: tf.Tensor, denoise: Denoise, seed: tf.Tensor) -> tf.Tensor:
    """Squared error of masked pixels, which are predicted from others, against their noisy values: >= 0.

    It is the error of the prediction plus the variance of the noise, if the noise is independent between pixels.
    Source: dae/losses/self_supervised.py, `noise2void`.
    """
    return masked_error(noisy, denoise, seed)


def residual_mean(denoised: tf.Tensor, *, noisy: tf.Tensor) -> tf.Tensor:
    """Mean of the residual, noisy - denoised: 0 if what is removed has mean 0."""
    return tf.reduce_mean(noisy - denoised, axis=[1, 2, 3])


def residual_correlation(denoised: tf.Tensor, *, noisy: tf.Tensor) -> tf.Tensor:
    """Correlation of the residual between pixels that are neighbours in a row or column: in [-1, 1], 0 for white noise.

    Structure of the images in the residual makes it positive; so does noise that is correlated itself.
    """
    residual = noisy - denoised
    residual -= tf.reduce_mean(residual, axis=[1, 2], keepdims=True)
    along_rows = tf.reduce_mean(residual[:, :, 1:] * residual[:, :, :-1], axis=[1, 2, 3])
    along_columns = tf.reduce_mean(residual[:, 1:] * residual[:, :-1], axis=[1, 2, 3])
    variance = tf.reduce_mean(tf.square(residual), axis=[1, 2, 3])
    return tf.math.divide_no_nan((along_rows + along_columns) / 2, variance)


# Of images without clean ones.
NOISY_METRICS: dict[str, ImageFunction] = {
    function.__name__: ImageFunction(function, function.__name__)
    for function in (blind_spot_error, residual_mean, residual_correlation)
}
HIGHER_IS_BETTER = ("psnr", "ssim", "accuracy")


def load(config: RunConfig, has_clean: bool = True) -> dict[str, ImageFunction]:
    """Return METRICS, or NOISY_METRICS, and those that `config.metrics` adds, by the names of their functions.

    Raises UsageError if there is no such function, if its name is taken, or if it needs clean images and there are
    none.
    """
    functions = dict(METRICS if has_clean else NOISY_METRICS)
    for text in config.metrics:
        name, source = plugins.label(text), f"--metrics: {plugins.source(text)}"
        function = ImageFunction(plugins.load({}, text, "--metrics"), source)
        if name in {*functions, "loss", "psnr_of_mean_mse"} or name.startswith("loss_"):
            raise UsageError(f"{source}: the name {name!r} is taken; rename the function")
        if "clean" in function.images and not has_clean:
            raise UsageError(f"{source}: needs clean images")
        functions[name] = function
    return functions


def check(functions: Mapping[str, ImageFunction], objective: Objective, model: keras.Model, batch: Batch) -> None:
    """Raise UsageError unless every metric that a user adds returns one finite float32 value per image of a batch.

    Each is also tried in a graph, in which the evaluation calls it.
    """
    network = fused(model, training=False)

    def values(function: ImageFunction, batch: Batch) -> tf.Tensor:
        outputs = network(batch.noisy)
        return function(batch.clean, outputs.images, objective.inputs(network, batch, outputs))

    for function in (function for name, function in functions.items() if name not in METRICS | NOISY_METRICS):
        if network(batch.noisy).latents is None and {"latents", "encode"} & {*function.inputs}:
            raise UsageError(f"{function.prefix}: needs latents, but the network has no layer `encoder`")
        with plugins.errors_with_line(function.prefix, plugins.file_of(function.function)):
            found = values(function, batch)
            check_per_image(found, len(batch.clean), function.prefix)
            check_finite(found, "finite values", function.prefix)
            tf.function(functools.partial(values, function)).get_concrete_function(batch)


def format_metrics(report: Mapping[str, float]) -> str:
    """Format the test metrics of a report for display."""
    if "test_psnr" not in report:
        names = ("loss", *NOISY_METRICS)
        return ", ".join(f"{name.replace('_', ' ')} {report[f'test_{name}']:.5f}" for name in names)
    loss = "loss {test_loss:.4f}, " if "test_loss" in report else ""
    return (
        loss + "BCE {test_bce:.4f} ({test_bce_excess:.4f} above its lower bound), MSE {test_mse:.4f}, "
        "PSNR {test_psnr:.2f} dB ({of_mean:.2f} dB of the mean MSE), SSIM {test_ssim:.3f}"
    ).format(**report, of_mean=psnr_of_mse(report["test_mse"]))
