"""The contract of a loss, checked on real images before a run writes anything."""

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae.data.pipeline import Batch
from dae.errors import UsageError, warn
from dae.losses.composite import Term
from dae.losses.losses import LOSSES
from dae.losses.objective import Objective
from dae.models.fused_layers import fused
from dae.plugins import errors_with_line, file_of
from dae.seeding import derive_seed, keras_seed

# Rounding may differ by this much between a graph and eager mode, and between a batch and a part of it.
RTOL, ATOL = 1e-3, 1e-5


def check(objective: Objective, model: keras.Model, batch: Batch) -> None:
    """Check every term of a loss on a batch of training images; built-in losses only for whether they fit the run.

    A term must return one finite float32 value per image, with a finite gradient, even where pixels are exactly 0 or 1;
    and the same values in a graph as in eager mode. Otherwise UsageError is raised, with the line if the function
    failed. Warns if images of a batch depend on each other. Afterwards, a loss has its initial weights.
    """
    for term in objective.loss.terms:
        source = f"--loss: {term.source}"
        with errors_with_line(source, file_of(term.function if term.layer is None else type(term.layer).call)):
            call = _first_call(term, objective, model, batch)
            if term.layer is not None:
                _check_state(term, call, model, batch)
            elif term.function not in LOSSES.values() and not term.is_regularization:
                _check_values(term, call, model, batch)


def check_initial_weights(objective: Objective, again: Objective, model: keras.Model, batch: Batch) -> None:
    """Raise UsageError if a loss that was built twice, as `objective` and `again`, has different initial variables."""
    terms = [term for term in objective.loss.terms if not term.is_regularization]
    for term, rebuilt in zip(terms, again.loss.terms, strict=True):
        if term.layer is not None:
            _first_call(rebuilt, again, model, batch)
            with tempfile.TemporaryDirectory() as folder:
                first, second = (_save(layer, f"{folder}/state") for layer in (term.layer, rebuilt.layer))
            if first != second:
                raise UsageError(
                    f"--loss: {term.source}: has other initial weights whenever it is created; draw them with Keras's "
                    "initializers, whose seeds are a function of --seed"
                )


def check_per_image(values: Any, count: int, prefix: str) -> None:
    """Raise UsageError, with `prefix`, unless `values` is a float32 tensor [count]."""
    is_tensor = tf.is_tensor(values)
    if not is_tensor or values.shape != (count,) or values.dtype != tf.float32:
        got = f"{values.dtype.name} {list(values.shape)}" if is_tensor else f"a {type(values).__name__}"
        hint = "; take the mean over axis=[1, 2, 3] only" if is_tensor and values.shape != (count,) else ""
        raise UsageError(f"{prefix}: expected a tensor, float32 [{count}], one value per image, got {got}{hint}")


def check_finite(values: tf.Tensor, what: str, prefix: str) -> None:
    """Raise UsageError, with `prefix`, unless all `values` are finite; `what` names them in the message."""
    wrong = tf.boolean_mask(values, ~tf.math.is_finite(values))
    if len(wrong):
        raise UsageError(f"{prefix}: expected {what}, got {float(wrong[0])}")


def _save(layer: keras.Layer | None, prefix: str) -> dict[str, bytes]:
    """Write a checkpoint of a loss, and return the content of all variables in it by name."""
    reader = tf.train.load_checkpoint(tf.train.Checkpoint(loss=layer).write(prefix))
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    return {name: np.asarray(reader.get_tensor(name)).tobytes() for name in names}


def _first_call(term: Term, objective: Objective, model: keras.Model, batch: Batch) -> Callable[..., Any]:
    """Call a term for one image, by which it may reject the run and creates its weights; return how to call it."""

    def call(method: Any, batch: Batch, denoised: tf.Tensor | None = None) -> Any:
        network = fused(model, training=False)  # so that Dropout does not make two calls differ
        outputs = network(batch.noisy)
        if outputs.latents is None and term.inputs & {"latents", "encode"}:
            raise UsageError(f"--loss: {term.source}: needs latents, but the network has no layer `encoder`")
        # The copy has no logits, which Keras attaches to the output of a sigmoid, and would use instead.
        outputs = outputs._replace(denoised=tf.identity(outputs.denoised if denoised is None else denoised))
        return method(batch.clean, outputs.denoised, objective.inputs(network, batch, outputs))

    with keras_seed(derive_seed(objective.config.seed, f"first call of loss {term.name}")):
        call(term.call, batch.images(0, 1))
    return call


def _check_values(term: Term, call: Callable[..., Any], model: keras.Model, batch: Batch) -> None:
    source = f"--loss: {term.source}"

    def finite_values(batch: Batch, denoised: tf.Tensor | None, images: str) -> np.ndarray:
        watched = [] if denoised is None else [denoised]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            losses = call(term.call, batch, denoised)
        check_per_image(losses, batch.clean.shape[0], source)
        check_finite(losses, f"a finite value for {images}", source)
        gradients = [found for found in tape.gradient(losses, model.trainable_variables + watched) if found is not None]
        if not gradients:
            raise UsageError(f"{source}: has no gradient with respect to `denoised`; use differentiable operations")
        for gradient in gradients:
            check_finite(gradient, f"a finite gradient for {images}", source)
        return losses.numpy()

    values = finite_values(batch, None, "training images")
    zeros, ones, binary = tf.zeros_like(batch.clean[:1]), tf.ones_like(batch.clean[:1]), tf.round(batch.clean[:4])
    clean = tf.concat([zeros, zeros, ones, ones, binary, binary], axis=0)
    denoised = tf.concat([zeros, ones, zeros, ones, binary, 1 - binary], axis=0)
    level = tf.repeat(batch.noise_level[:1], len(clean), axis=0)
    finite_values(Batch(denoised, clean, level, batch.seed), denoised, "images of only 0 and 1")
    again = tf.function(lambda: call(term.call, batch)).get_concrete_function()().numpy()
    if not np.allclose(again, values, RTOL, ATOL):
        raise UsageError(
            f"{source}: differs between two calls, in a graph and in eager mode: {again[:3].tolist()} and "
            f"{values[:3].tolist()}; compute it from its inputs alone, without NumPy, state, or random numbers other "
            "than stateless ones from `seed`"
        )
    half = max(1, len(values) // 2)
    alone = call(term.call, batch.images(0, half))
    if not term.inputs & {"seed", "second_noisy"} and not np.allclose(alone, values[:half], RTOL, ATOL):
        warn(
            f"{source}: the loss of an image depends on the others in its batch; training computes it for each shard "
            "of a batch (see --shards), and validation for batches of another size"
        )


def _check_state(term: Term, call: Callable[..., Any], model: keras.Model, batch: Batch) -> None:
    """Check the values of a loss that has weights, and its update; afterwards its state is as before."""
    source = f"--loss: {term.source}"
    with tempfile.TemporaryDirectory() as folder:
        before = _save(term.layer, f"{folder}/before")
        _check_values(term, call, model, batch)
        if _save(term.layer, f"{folder}/called") != before:
            raise UsageError(f"{source}: changes its state when it is called; do that in a method `update`")
        if term.update is not None:
            call(term.update, batch)
        if created := len(_save(term.layer, f"{folder}/updated")) - len(before):
            raise UsageError(
                f"{source}: the first `update` creates {created} variables; create them in __init__ or build, and "
                "build an optimizer there too: optimizer.build(variables)"
            )
        tf.train.Checkpoint(loss=term.layer).read(f"{folder}/before").assert_consumed()
