"""The gradient computation: what one batch does to the train state. Nothing is read, written or printed here.

AutoGraph translates the step and users' functions, where `if` and `for` may depend on tensors. Whatever else the step
calls has the decorator `do_not_convert` where translating it would delay the first step noticeably.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from dae.data.pipeline import Batch
from dae.errors import Diverged
from dae.losses.objective import Objective
from dae.models.fused_layers import SeededNetwork
from dae.replicas import ALONE, Replicas
from dae.training.train_state import TrainState, global_norm

TrainStep = Any  # a tf.function, which mypy does not know
TrainLoop = Callable[[Iterator[Batch], int, int], tf.Tensor]


def make_train_step(
    state: TrainState, objective: Objective, network: SeededNetwork, replicas: Replicas = ALONE
) -> TrainStep:
    """Return the function from a batch to its mean loss that takes one step of `state`.

    It raises InvalidArgumentError, before it assigns anything, if the loss or its gradient is not finite.
    """
    statistics = state.model.non_trainable_weights  # such as the moving averages of batch normalization

    def shard_gradients(shard: Batch) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        with tf.GradientTape() as tape:
            minimized, values = objective(network(shard.seed), shard)
        # A loss of the latents alone does not depend on the decoder.
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(minimized, state.trainable_variables, unconnected_gradients=zero), values

    @tf.function
    def train_step(batch: Batch) -> tf.Tensor:
        (gradients, values), new_statistics = replicas.mean(shard_gradients, batch, statistics)
        values["gradient_norm"] = global_norm(gradients)
        with finite(values["loss"], values["gradient_norm"]):
            state.apply(gradients, new_statistics, values, num_images=batch.clean.shape[0])
            objective.after_step(network, batch)
        return values["loss"]

    return train_step


def finite(loss: tf.Tensor, gradient_norm: tf.Tensor) -> contextlib.AbstractContextManager:
    """Return a context whose operations are executed after the check that the loss and its gradient are finite."""
    return tf.control_dependencies(
        [
            tf.debugging.assert_all_finite(loss, "the loss"),
            tf.debugging.assert_all_finite(gradient_norm, "the gradient"),
        ]
    )


def make_train_loop(train_step: TrainStep, state: TrainState) -> TrainLoop:
    """Return the function `(batches, num_steps, batch_size) -> mean loss of the last step` that takes several steps.

    `batches` is an iterator of a `tf.data` pipeline whose next `num_steps` batches have `batch_size` images. One call
    takes many steps because cores would otherwise wait for Python between two steps (docs/results.md, "Train loop").
    Raises Diverged, which names the step, if a loss or a gradient is not finite.
    """

    def train_loop(batches: Iterator[Batch], num_steps: tf.Tensor, batch_size: int) -> tf.Tensor:
        mean_loss = tf.constant(0.0)
        for _ in tf.range(num_steps):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # fetch no batch ahead of its step
            # A static shape makes a step 7 % faster, and the graph of a user's noise may not know it.
            mean_loss = train_step(next(batches).of_size(batch_size))
        return mean_loss

    # TensorFlow tells functions apart by their code, which a partial has not, and would warn at the third run of a
    # process that one function is traced again and again.
    separate: Any = functools.partial(train_loop)
    separate.__name__ = train_loop.__name__  # which a profile shows
    compiled = tf.function(separate)

    def checked(batches: Iterator[Batch], num_steps: int, batch_size: int) -> tf.Tensor:
        try:
            return compiled(batches, tf.constant(num_steps), batch_size)
        except tf.errors.InvalidArgumentError as error:
            if (found := re.search("the (loss|gradient) : Tensor had", error.message)) is None:
                raise
            raise Diverged(
                f"the {found[1]} of step {int(state.step) + 1} is not finite; earlier checkpoints are intact; start "
                "another run with a lower --learning-rate"
            ) from None

    return checked
