"""Losses: functions `(clean, denoised) -> loss [batch]`, one number per example.

`clean` and `denoised` are float32 [batch, H, W, C] in [0, 1], H and W at least 11; every gradient is finite.
The train step takes the mean over the batch. Add one in a file of your own (README.md, "Add your own loss in five
minutes"), or here, with an entry in `LOSSES`.
"""

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from dae import plugins
from dae.errors import UsageError
from dae.losses import expression
from dae.losses import ssim as similarity

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def bce(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy, -(x log y + (1 - x) log(1 - y)), mean over pixels: nats per pixel, from 0 up.

    Its minimum over y is at y = x, but not 0 there: a grey pixel has entropy. Source: Keras, which computes it from
    the logits where y comes straight from a sigmoid, and elsewhere keeps y 1e-7 away from 0 and 1 (then it is at most
    16.2).
    """
    return tf.reduce_mean(keras.losses.binary_crossentropy(clean, denoised), axis=[1, 2])


def mse(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Squared error (x - y)^2, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_squared_error(clean, denoised), axis=[1, 2])


def mae(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Absolute error |x - y|, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_absolute_error(clean, denoised), axis=[1, 2])


HUBER_DELTA = 0.1  # at Keras's 1, errors of images in [0, 1] would never leave the square: half of mse


def huber(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """e^2 / 2 where e = |x - y| is at most d = 0.1, d (e - d / 2) beyond; mean over pixels: in [0, 0.095].

    Source: Keras; Huber, Robust Estimation of a Location Parameter (1964).
    """
    return tf.reduce_mean(keras.losses.huber(clean, denoised, delta=HUBER_DELTA), axis=[1, 2])


CHARBONNIER_EPSILON = 1e-3


def charbonnier(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """sqrt((x - y)^2 + 0.001^2), mean over pixels: |x - y| with a round bottom, in [0.001, 1.000001].

    Source: Charbonnier et al., Two Deterministic Half-Quadratic Regularization Algorithms (1994); the constant is that
    of Lai et al., Fast and Accurate Image Super-Resolution with Deep Laplacian Pyramid Networks (2018).
    """
    return tf.reduce_mean(tf.sqrt(tf.square(clean - denoised) + CHARBONNIER_EPSILON**2), axis=[1, 2, 3])


def ssim(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """1 - SSIM, the structural dissimilarity of each image: in [0, 2], 0 for equal ones. Source: dae/ssim.py."""
    return 1 - similarity.ssim(clean, denoised)


LOSSES: dict[str, Loss] = {
    "bce": bce,
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "charbonnier": charbonnier,
    "ssim": ssim,
}


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of what a run minimises; `where` tells the user's file, if the function is in one."""

    weight: float
    name: str
    function: Loss
    where: str


@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """What a run minimises: the sum of weight * function over one or more terms."""

    terms: tuple[Term, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values: "loss", and where there are several terms "loss_bce" ... for each of them."""
        return ("loss", *(f"loss_{term.name}" for term in self.terms if len(self.terms) > 1))

    def __call__(self, clean: tf.Tensor, denoised: tf.Tensor) -> dict[str, tf.Tensor]:
        """Each of `names` as float32 [batch]: the sum, and the terms without their weights."""
        values = [term.function(clean, denoised) for term in self.terms]
        weighted = [
            value if term.weight == 1 else term.weight * value for term, value in zip(self.terms, values, strict=True)
        ]
        total = tf.add_n(weighted) if len(weighted) > 1 else weighted[0]
        return dict(zip(self.names, [total, *values], strict=False))


def given(function: Loss, text: str) -> WeightedSum:
    """A function given from Python as the whole of the loss; `text` is what stands for it in the configuration."""
    name = plugins.label(text)
    return WeightedSum((Term(1.0, name, function, name),))


def load(text: str) -> WeightedSum:
    """The sum that `--loss` says, such as "bce + 0.1*my_losses.py:my_loss"; raises UsageError where there is none.

    Runs the files of the user's own that it names.
    """
    if plugins.is_given(text):
        name = plugins.label(text)
        raise UsageError(f"--loss: {name} was a Python function; give it again: dae.train(config, loss={name})")
    weighted = expression.parse(text)
    # A name of its own for each curve; "total" is that of the sum's.
    _, *labels = plugins.distinct(["total", *(plugins.label(name) for _, name in weighted)], separator="_")
    return WeightedSum(
        tuple(
            Term(
                weight,
                label,
                plugins.choose(LOSSES, name, "--loss"),
                plugins.substitute(name, lambda one: f"{one.path}:{one.function}"),
            )
            for (weight, name), label in zip(weighted, labels, strict=True)
        )
    )
