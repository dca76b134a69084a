"""The gradient computation: what one batch does to the train state. Nothing is read, written or printed here."""

from collections.abc import Callable, Iterator

import tensorflow as tf

from dae.data.pipeline import Batch, split_batch
from dae.losses.composite import CompositeLoss
from dae.models.fused_layers import fused
from dae.optimizers.adam import flatten
from dae.training.train_state import TrainState

TrainStep = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
TrainLoop = Callable[[Iterator[Batch], tf.Tensor, int], tf.Tensor]


def make_train_step(
    state: TrainState, loss: CompositeLoss, shards: int = 1, max_gradient_norm: float | None = None
) -> TrainStep:
    """Return the function `(noisy, clean) -> mean loss of the batch` that takes one step of `state`.

    Images are float32 [batch, H, W, C]. The batch is computed in `shards` parts in parallel, which changes only the
    last bits of the result. Raises InvalidArgumentError, before any weight changes, if the loss or its gradient is not
    finite.
    """
    model, optimizer = state.model, state.optimizer

    @tf.function
    def train_step(noisy: tf.Tensor, clean: tf.Tensor) -> tf.Tensor:
        weights = model.trainable_variables
        with tf.GradientTape() as tape:
            denoise = fused(model)
            shard_losses = [
                tf.stack(list(loss(clean_shard, denoise(noisy_shard)).values()))
                for noisy_shard, clean_shard in split_batch(shards, noisy, clean)
            ]
            losses = tf.unstack(tf.reduce_mean(tf.concat(shard_losses, axis=1), axis=1))  # the total and its terms
            mean_loss = losses[0]
        gradients = tape.gradient(mean_loss, weights)
        gradient_norm = tf.norm(flatten(gradients))
        finite = [
            tf.debugging.assert_all_finite(mean_loss, "the loss"),
            tf.debugging.assert_all_finite(gradient_norm, "the gradient"),
        ]
        with tf.control_dependencies(finite):
            if max_gradient_norm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, max_gradient_norm, use_norm=gradient_norm)
            before = flatten(weights)
            optimizer.apply(gradients, weights)
            means = dict(zip(loss.names, losses, strict=True))
            means["gradient_norm"] = gradient_norm
            means["update_to_weight_ratio"] = tf.norm(flatten(weights) - before) / tf.norm(before)
            state.means.update(means, images=clean.shape[0])
            state.step.assign_add(1)
        return mean_loss

    return train_step


def make_train_loop(train_step: TrainStep) -> TrainLoop:
    """Return the function `(batches, num_steps, batch_size) -> mean loss of the last step` that takes several steps.

    `batches` is an iterator of a `tf.data` pipeline whose next `num_steps` batches have `batch_size` images. One call
    takes many steps because cores would otherwise wait for Python between two steps (docs/results.md, "Train loop").
    """

    @tf.function
    def train_loop(batches: Iterator[Batch], num_steps: tf.Tensor, batch_size: int) -> tf.Tensor:
        mean_loss = tf.constant(0.0)
        for _ in tf.range(num_steps):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # fetch no batch ahead of its step
            noisy, clean = next(batches)
            # A static shape makes a step 7 % faster, and the graph of a user's noise may not know it.
            shape = [batch_size, *clean.shape[1:]]
            mean_loss = train_step(tf.ensure_shape(noisy, shape), tf.ensure_shape(clean, shape))
        return mean_loss

    return train_loop
