"""The train step: what one batch does to the weights. It computes only; nothing is written or printed here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from dae.data.pipeline import Batch, micro_batches
from dae.errors import RunError
from dae.losses.losses import WeightedSum
from dae.models.fused_layers import fused
from dae.training.run import Run

TrainStep = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
TrainSteps = Callable[[Iterator[Batch], tf.Tensor], tf.Tensor]


def make_train_step(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: WeightedSum, state: Any, parts: int = 1
) -> TrainStep:
    """The step `(noisy, clean) -> mean loss of the batch` that trains `model` and counts in `Checkpoints.state`.

    The batch is computed as `parts` micro-batches side by side, which changes nothing but the last bits. Raises
    InvalidArgumentError, before any weight changes, where the loss or its gradient is not finite.
    """

    @tf.function
    def train_step(noisy: tf.Tensor, clean: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            denoise = fused(model)
            of_parts = [
                tf.stack(list(loss(some_clean, denoise(some_noisy)).values()))
                for some_noisy, some_clean in micro_batches(parts, noisy, clean)
            ]
            losses = tf.concat(of_parts, axis=1)  # [the whole and its terms, batch]
            mean_loss = tf.reduce_mean(losses[0])
        gradients = tape.gradient(mean_loss, model.trainable_variables)
        gradient_norm = tf.linalg.global_norm(gradients)
        finite = [
            tf.debugging.assert_all_finite(mean_loss, "the loss"),
            tf.debugging.assert_all_finite(gradient_norm, "the gradient"),
        ]
        with tf.control_dependencies(finite):
            optimizer.apply(gradients, model.trainable_variables)
            state.step.assign_add(1)
            state.loss_sums.assign_add(tf.reduce_sum(tf.cast(losses, tf.float64), axis=1))
            state.images.assign_add(tf.size(losses[0], tf.int64))
            state.gradient_norms.assign_add(tf.cast(gradient_norm, tf.float64))
        return mean_loss

    return train_step


def make_train_steps(train_step: TrainStep, batch_size: int) -> TrainSteps:
    """`(batches, count) -> mean loss of the last one`: so many steps, each of a full batch of a `tf.data` iterator.

    One call for many steps, so that no core waits for Python between them: a step of `conv` takes a tenth less.
    """

    @tf.function
    def train_steps(batches: Iterator[Batch], count: tf.Tensor) -> tf.Tensor:
        mean_loss = tf.constant(0.0)
        for _ in tf.range(count):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # fetches no batch before its turn
            noisy, clean = next(batches)
            shape = [batch_size, *clean.shape[1:]]  # a noise of one's own may not know it
            mean_loss = train_step(tf.ensure_shape(noisy, shape), tf.ensure_shape(clean, shape))
        return mean_loss

    return train_steps


@contextlib.contextmanager
def naming_what_is_not_finite(run: Run) -> Iterator[None]:
    """Turns the train step's refusal of a number that is not finite into a RunError that says where."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        culprit = next((word for word in ("loss", "gradient") if f"the {word} : Tensor had" in error.message), None)
        if culprit is None:
            raise
        raise RunError(
            f"the {culprit} of step {int(run.checkpoints.state.step) + 1} is not finite; "
            f"what was saved before it in {run.folder} is good; another run may need a lower --learning-rate than "
            f"{run.config.learning_rate}"
        ) from None
