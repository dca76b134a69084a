"""The contract of a loss, checked on real images before a run writes anything."""

import dataclasses
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

from dae.data.pipeline import Batch, part_of
from dae.errors import UsageError
from dae.losses.composite import Term
from dae.losses.objective import Objective
from dae.models.fused_layers import fused
from dae.plugins import errors_with_line, file_of
from dae.seeding import derive_seed, keras_seed

# Rounding may differ by this much between a graph and eager mode, and between a batch and a part of it.
RTOL, ATOL = 1e-3, 1e-5


def check(objective: Objective, model: keras.Model, batch: Batch) -> None:
    """Check every term of a loss on a batch of training images; built-in losses only for whether they fit the run.

    A term must return one finite float32 value per image, with a finite gradient, even where pixels are exactly 0 or 1;
    and the same values for the same inputs, in a graph as in eager mode. Otherwise UsageError is raised, which names
    the file, the function and, if the function raised an exception, the line. Warns if the value of an image depends on
    the other images of the batch. Afterwards, a loss that has weights has created them, with their initial values.
    """
    for term in objective.loss.terms:
        prefix = f"--loss: {term.source}"
        with errors_with_line(prefix, file_of(term.function if term.layer is None else type(term.layer).call)):
            checked = _Checked(term, prefix, objective, model)
            checked.first_call(batch)
            if term.layer is not None:
                checked.check_state(batch)
            elif not term.is_builtin:
                checked.check_values(batch)


def check_initial_weights(objective: Objective, again: Objective, model: keras.Model, batch: Batch) -> None:
    """Raise UsageError if a loss that was built twice, as `objective` and `again`, has different initial variables."""
    for term, other in zip(objective.loss.terms, again.loss.terms, strict=True):
        if term.layer is not None:
            prefix = f"--loss: {term.source}"
            _Checked(other, prefix, again, model).first_call(batch)
            if not _same(_state(term.layer), _state(other.layer)):
                raise UsageError(
                    f"{prefix}: has other initial weights whenever it is created; draw them with Keras's initializers, "
                    "whose seeds are a function of --seed"
                )


def _state(layer: keras.Layer | None) -> dict[str, np.ndarray]:
    """Return all variables of a loss, as a checkpoint would hold them, by name."""
    with tempfile.TemporaryDirectory() as folder:
        reader = tf.train.load_checkpoint(tf.train.Checkpoint(loss=layer).write(f"{folder}/state"))
        names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
        return {name: reader.get_tensor(name) for name in names}


def _same(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return state.keys() == other.keys() and all(np.array_equal(state[name], other[name]) for name in state)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A term, and what it is called with."""

    term: Term
    prefix: str
    objective: Objective
    model: keras.Model

    def call(self, batch: Batch, denoised: tf.Tensor | None = None) -> tf.Tensor:
        """Return the loss of each image for these `denoised` images, or for those of the network."""
        network = fused(self.model, training=False)  # so that Dropout does not make two calls differ
        outputs = network(batch.noisy)
        # The copy has no logits, which Keras attaches to the output of a sigmoid, and would use instead.
        outputs = outputs._replace(denoised=tf.identity(outputs.denoised if denoised is None else denoised))
        if outputs.latents is None and self.term.inputs & {"latents", "encode"}:
            raise UsageError(f"{self.prefix}: needs latents, but the network has no layer `encoder`")
        return self.term(batch.clean, outputs.denoised, self.objective.inputs(network, batch, outputs))

    def check_values(self, batch: Batch) -> None:
        values = self.finite_values(batch, None, "training images")
        zeros, ones, binary = tf.zeros_like(batch.clean[:1]), tf.ones_like(batch.clean[:1]), tf.round(batch.clean[:4])
        clean = tf.concat([zeros, zeros, ones, ones, binary, binary], axis=0)
        denoised = tf.concat([zeros, ones, zeros, ones, binary, 1 - binary], axis=0)
        level = tf.repeat(batch.noise_level[:1], len(clean), axis=0)
        self.finite_values(Batch(denoised, clean, level, batch.seed), denoised, "images of only 0 and 1")
        in_graph = tf.function(lambda: self.call(batch)).get_concrete_function()().numpy()
        for again, way in ((self.call(batch).numpy(), "two calls"), (in_graph, "a graph and eager mode")):
            if not np.allclose(again, values, RTOL, ATOL):
                raise UsageError(
                    f"{self.prefix}: differs between {way}, {_head(again)} and {_head(values)}; compute it from its "
                    "inputs alone, without NumPy, state, or random numbers other than stateless ones from `seed`"
                )
        if not self.term.inputs & {"seed", "second_noisy"}:
            half = max(1, len(values) // 2)
            if not np.allclose(self.call(part_of(batch, 0, half)).numpy(), values[:half], RTOL, ATOL):
                print(
                    f"warning: {self.prefix}: the loss of an image depends on the others in its batch; training "
                    "computes it for each shard of a batch (see --shards), and validation for batches of another size",
                    file=sys.stderr,
                )

    def finite_values(self, batch: Batch, denoised: tf.Tensor | None, images: str) -> np.ndarray:
        """Return the loss of each image. Raises UsageError unless each has one finite value with a finite gradient.

        `images` describes the batch in error messages.
        """
        with tf.GradientTape() as tape:
            if denoised is not None:
                tape.watch(denoised)
            losses = self.call(batch, denoised)
        expected = f"float32 [{batch.clean.shape[0]}], one value per image"
        if not tf.is_tensor(losses):
            raise UsageError(f"{self.prefix}: expected a tensor, {expected}, got a {type(losses).__name__}")
        if losses.shape != (batch.clean.shape[0],):
            raise UsageError(
                f"{self.prefix}: expected {expected}, got {losses.dtype.name} {list(losses.shape)}; "
                "take the mean over axis=[1, 2, 3] only"
            )
        if losses.dtype != tf.float32:
            raise UsageError(f"{self.prefix}: expected {expected}, got {losses.dtype.name}")
        sources = [*self.model.trainable_variables, *([] if denoised is None else [denoised])]
        gradients = [gradient for gradient in tape.gradient(losses, sources) if gradient is not None]
        if not gradients:
            raise UsageError(
                f"{self.prefix}: has no gradient with respect to `denoised`; use differentiable operations"
            )
        for quantity, tensors in (("value", [losses]), ("gradient", gradients)):
            numbers = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
            wrong = tf.boolean_mask(numbers, ~tf.math.is_finite(numbers))
            if len(wrong):
                raise UsageError(f"{self.prefix}: expected a finite {quantity} for {images}, got {float(wrong[0])}")
        return losses.numpy()

    def first_call(self, batch: Batch) -> None:
        """Call the loss for one image. It may refuse the run, and creates its weights."""
        with keras_seed(derive_seed(self.objective.config.seed, f"first call of loss {self.term.name}")):
            self.call(part_of(batch, 0, 1))

    def check_state(self, batch: Batch) -> None:
        """Check the values of a loss that has weights, and its update; afterwards its state is as before.

        Raises UsageError if a call changes the state, or if the first update creates variables.
        """
        checkpoint = tf.train.Checkpoint(loss=self.term.layer)
        with tempfile.TemporaryDirectory() as folder:
            before, state = checkpoint.write(f"{folder}/before"), _state(self.term.layer)
            self.check_values(batch)
            if not _same(state, _state(self.term.layer)):
                raise UsageError(f"{self.prefix}: changes its state when it is called; do that in a method `update`")
            network = fused(self.model, training=False)
            outputs = network(batch.noisy)
            self.term.update(batch.clean, outputs.denoised, self.objective.inputs(network, batch, outputs))
            if created := len(_state(self.term.layer)) - len(state):
                raise UsageError(
                    f"{self.prefix}: the first `update` creates {created} variables; create them in __init__ or build, "
                    "and build an optimizer there too: optimizer.build(variables)"
                )
            checkpoint.read(before).assert_consumed()


def _head(values: np.ndarray) -> str:
    return str(values[:3].tolist())
