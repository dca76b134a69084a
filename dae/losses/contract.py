"""The contract of a loss, checked on real images before a run writes anything."""

import inspect
import sys

import numpy as np
import tensorflow as tf

from dae.errors import UsageError
from dae.losses.composite import CompositeLoss, Term
from dae.losses.losses import Loss
from dae.plugins import errors_with_line

# Rounding may differ by this much between a graph and eager mode, and between a batch and a part of it.
RTOL, ATOL = 1e-3, 1e-5


def check(loss: CompositeLoss, clean: tf.Tensor, denoised: tf.Tensor) -> None:
    """Check every term of a loss on a batch of images, float32 [batch, H, W, C] in [0, 1].

    A term must return one finite float32 value per image, with a finite gradient, even where pixels are exactly 0 or 1,
    and the same values in a graph and in eager mode. Otherwise UsageError is raised, which names the file, the function
    and, if the function raised an exception, the line. Warns if the value of an image depends on the other images of
    the batch.
    """
    denoised = tf.identity(denoised)  # without the logits that Keras attaches and would use instead
    for term in loss.terms:
        prefix = f"--loss: {term.source}"
        with errors_with_line(prefix, _file(term.function)):
            _check(term, prefix, clean, denoised)


def _check(term: Term, prefix: str, clean: tf.Tensor, denoised: tf.Tensor) -> None:
    values = _values(term.function, prefix, clean, denoised, "training images")
    zeros, ones, binary = tf.zeros_like(clean[:1]), tf.ones_like(clean[:1]), tf.round(clean[:4])
    _values(
        term.function,
        prefix,
        tf.concat([zeros, zeros, ones, ones, binary, binary], axis=0),
        tf.concat([zeros, ones, zeros, ones, binary, 1 - binary], axis=0),
        "images of only 0 and 1",
    )
    in_graph = tf.function(term.function).get_concrete_function(clean, denoised)(clean, denoised).numpy()
    if not np.allclose(in_graph, values, RTOL, ATOL):
        raise UsageError(
            f"{prefix}: differs between a graph, {_head(in_graph)}, and eager mode, {_head(values)}; compute it from "
            "clean and denoised alone, without random numbers, NumPy or state"
        )
    half = max(1, len(values) // 2)
    alone = term.function(clean[:half], denoised[:half]).numpy()
    if not np.allclose(alone, values[:half], RTOL, ATOL):
        print(
            f"warning: {prefix}: the loss of an image depends on the others in its batch; training computes it for "
            "each shard of a batch (see --shards), and validation for batches of another size",
            file=sys.stderr,
        )


def _values(function: Loss, prefix: str, clean: tf.Tensor, denoised: tf.Tensor, images: str) -> np.ndarray:
    """Return the loss of each image. Raises UsageError unless each has one finite value with a finite gradient.

    `images` describes the batch in error messages.
    """
    with tf.GradientTape() as tape:
        tape.watch(denoised)
        losses = function(clean, denoised)
    expected = f"float32 [{clean.shape[0]}], one value per image"
    if not tf.is_tensor(losses):
        raise UsageError(f"{prefix}: expected a tensor, {expected}, got a {type(losses).__name__}")
    if losses.shape != (clean.shape[0],):
        raise UsageError(
            f"{prefix}: expected {expected}, got {losses.dtype.name} {list(losses.shape)}; "
            "take the mean over axis=[1, 2, 3] only"
        )
    if losses.dtype != tf.float32:
        raise UsageError(f"{prefix}: expected {expected}, got {losses.dtype.name}")
    gradient = tape.gradient(losses, denoised)
    if gradient is None:
        raise UsageError(f"{prefix}: has no gradient with respect to `denoised`; use differentiable operations")
    for quantity, numbers in (("value", losses), ("gradient", tf.convert_to_tensor(gradient))):
        wrong = tf.boolean_mask(numbers, ~tf.math.is_finite(numbers))
        if len(wrong):
            raise UsageError(f"{prefix}: expected a finite {quantity} for {images}, got {float(wrong[0])}")
    return losses.numpy()


def _head(values: np.ndarray) -> str:
    return str(values[:3].tolist())


def _file(function: Loss) -> str:
    """Return the file that defines the function, or an empty string."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code else ""
