"""What every loss must be, checked on a real batch before a run writes anything."""

import inspect
import sys

import numpy as np
import tensorflow as tf

from dae.errors import UsageError
from dae.losses.losses import Loss, Term, WeightedSum
from dae.plugins import blaming

# Rounding may differ between a batch and a part of it, or a graph and its lines one by one; results may not.
RELATIVE, ABSOLUTE = 1e-3, 1e-5


def check(loss: WeightedSum, clean: tf.Tensor, denoised: tf.Tensor) -> None:
    """Raises UsageError, naming file, function and line, for a term that is not a loss.

    A loss returns one finite float32 number per example, with a finite gradient, also where pixels are 0 or 1
    exactly, and the same in a graph as line by line. Warns where an example's loss depends on the others of its
    batch. `clean` and `denoised` are float32 [batch, H, W, C] in [0, 1].
    """
    denoised = tf.identity(denoised)  # without the logits that Keras keeps with it, and derives by in place of it
    for term in loss.terms:
        culprit = f"--loss: {term.where}"
        with blaming(culprit, _file(term.function)):
            _check(term, culprit, clean, denoised)


def _check(term: Term, culprit: str, clean: tf.Tensor, denoised: tf.Tensor) -> None:
    values = _values(term.function, culprit, clean, denoised, "a batch of training images")
    zeros, ones, binary = tf.zeros_like(clean[:1]), tf.ones_like(clean[:1]), tf.round(clean[:4])
    _values(
        term.function,
        culprit,
        tf.concat([zeros, zeros, ones, ones, binary, binary], axis=0),
        tf.concat([zeros, ones, zeros, ones, binary, 1 - binary], axis=0),
        "images whose pixels are all 0 or 1",
    )
    in_graph = tf.function(term.function).get_concrete_function(clean, denoised)(clean, denoised).numpy()
    if not np.allclose(in_graph, values, RELATIVE, ABSOLUTE):
        raise UsageError(
            f"{culprit}: is {_some(in_graph)} in a graph, but {_some(values)} line by line; it is to be a function of "
            "clean and denoised alone, without random numbers, NumPy or state"
        )
    part = max(1, len(values) // 2)
    alone = term.function(clean[:part], denoised[:part]).numpy()
    if not np.allclose(alone, values[:part], RELATIVE, ABSOLUTE):
        print(
            f"warning: {culprit}: one example's loss depends on the others in its batch, which are those of its "
            "micro-batch in training (see --micro-batches) and others again in validation",
            file=sys.stderr,
        )


def _values(function: Loss, culprit: str, clean: tf.Tensor, denoised: tf.Tensor, images: str) -> np.ndarray:
    """The loss of each image; raises UsageError unless there is one, with its gradient."""
    with tf.GradientTape() as tape:
        tape.watch(denoised)
        losses = function(clean, denoised)
    count = clean.shape[0]
    if not tf.is_tensor(losses):
        raise UsageError(f"{culprit}: returns a {type(losses).__name__}, not a tensor, float32 [{count}]")
    if losses.shape != (count,) or losses.dtype != tf.float32:
        hint = "; take the mean over axis=[1, 2, 3] only" if losses.shape != (count,) else ""
        raise UsageError(
            f"{culprit}: returns {losses.dtype.name} {list(losses.shape)} for {count} images, "
            f"not one number each, float32 [{count}]{hint}"
        )
    gradient = tape.gradient(losses, denoised)
    if gradient is None:
        raise UsageError(f"{culprit}: has no gradient: it does not depend on `denoised` in a way that can be derived")
    for what, numbers in (("is", losses), ("has a gradient of", tf.convert_to_tensor(gradient))):
        wrong = tf.boolean_mask(numbers, ~tf.math.is_finite(numbers))
        if len(wrong):
            raise UsageError(f"{culprit}: {what} {float(wrong[0])} for {images}, which is not finite")
    return losses.numpy()


def _some(values: np.ndarray) -> str:
    return str(values[:3].tolist())


def _file(function: Loss) -> str:
    """The file that the function was written in, or nothing."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code else ""
