"""How good denoised images are: per-example functions like losses, and their exact mean over a data set."""

from collections.abc import Callable, Iterable, Mapping

import keras
import tensorflow as tf

from dae.data.pipeline import Batch, micro_batches
from dae.losses.losses import Loss, WeightedSum, bce, mse
from dae.losses.ssim import ssim
from dae.models.fused_layers import fused


def psnr(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Peak signal-to-noise ratio of each image, -10 log10(MSE), in dB. Source: `tf.image.psnr`, max value 1."""
    return tf.image.psnr(clean, denoised, max_val=1.0)


def bce_excess(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """BCE beyond the least that any denoiser could have: bce(x, y) - bce(x, x), in nats per pixel, from 0 up."""
    return bce(clean, denoised) - bce(clean, clean)


def accuracy(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Share of pixels where the denoised one, cut at 0.5, equals the clean one exactly; grey ones never do.

    Source: Keras, whose `accuracy` for such a network is this; kept because the tutorial prints it.
    """
    return tf.reduce_mean(keras.metrics.binary_accuracy(clean, denoised), axis=[1, 2, 3])


METRICS: dict[str, Loss] = {
    "bce": bce,
    "bce_excess": bce_excess,
    "mse": mse,
    "psnr": psnr,
    "ssim": ssim,
    "accuracy": accuracy,
}

HIGHER_IS_BETTER = ("psnr", "ssim", "accuracy")

Evaluate = Callable[[Iterable[Batch]], dict[str, float]]


def evaluator(model: keras.Model, loss: WeightedSum | None, parts: int = 1) -> Evaluate:
    """A function from (noisy, clean) batches to the means of the loss's values and of all METRICS over their images.

    Every image weighs the same, also in a smaller last batch; sums are float64. It is compiled once, so
    make it once and use it for every epoch. Each batch is computed as `parts` micro-batches side by side.
    """
    names = [*(loss.names if loss else ()), *METRICS]

    @tf.function
    def sums(noisy: tf.Tensor, clean: tf.Tensor) -> dict[str, tf.Tensor]:
        denoise = fused(model, training=False)
        of_parts: dict[str, list[tf.Tensor]] = {name: [] for name in names}
        for some_noisy, some_clean in micro_batches(parts, noisy, clean):
            denoised = denoise(some_noisy)
            values = loss(some_clean, denoised) if loss else {}
            values |= {name: metric(some_clean, denoised) for name, metric in METRICS.items()}
            for name, value in values.items():
                of_parts[name].append(tf.reduce_sum(tf.cast(value, tf.float64)))
        return {name: tf.add_n(sums_of_parts) for name, sums_of_parts in of_parts.items()}

    def evaluate(batches: Iterable[Batch]) -> dict[str, float]:
        totals, images = dict.fromkeys(names, 0.0), 0
        for noisy, clean in batches:
            for name, total in sums(noisy, clean).items():
                totals[name] += float(total)
            images += clean.shape[0]
        return {name: total / images for name, total in totals.items()}

    return evaluate


def in_words(figures: Mapping[str, float]) -> str:
    """The test figures of a report, for a reader."""
    loss = "loss {test_loss:.4f}, " if "test_loss" in figures else ""
    return (
        loss + "BCE {test_bce:.4f} ({test_bce_excess:.4f} over its floor), MSE {test_mse:.4f}, "
        "PSNR {test_psnr:.2f} dB, SSIM {test_ssim:.3f}"
    ).format(**figures)
