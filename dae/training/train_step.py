"""The gradient computation: what one batch does to the train state. Nothing is read, written or printed here."""

from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from dae.config import RunConfig
from dae.data.pipeline import Batch, split_batch
from dae.losses.losses import bce
from dae.losses.objective import Objective
from dae.models.fused_layers import Outputs, fused
from dae.optimizers.adam import flatten
from dae.training.train_state import TrainState

TrainStep = Callable[[Batch], tf.Tensor]
TrainLoop = Callable[[Iterator[Batch], tf.Tensor, int], tf.Tensor]


def make_train_step(state: TrainState, objective: Objective, config: RunConfig, mixes_bce: bool = True) -> TrainStep:
    """Return the function `batch -> mean loss of the batch` that takes one step of `state`.

    The batch is computed in `config.shards` parts in parallel, which changes only the last bits of the result, and the
    random numbers of a loss. Without `mixes_bce`, bce is not computed, as after the first `config.bce_steps`. Raises
    InvalidArgumentError, before any weight changes, if the loss or its gradient is not finite.
    """
    optimizer = state.optimizer

    @tf.function
    def train_step(batch: Batch) -> tf.Tensor:
        weights = state.trainable_variables
        seed_layers(state.model, batch.seed)
        with tf.GradientTape() as tape:
            network = fused(state.model)
            shards = split_batch(batch, config.shards or 1)
            outputs, values = zip(*(objective(network, shard) for shard in shards), strict=True)
            losses = [_mean([shard_values[name] for shard_values in values]) for name in objective.loss.names]
            minimized = mean_loss = losses[0]
            if mixes_bce and objective.starts_as_bce:
                pairs = zip(shards, outputs, strict=True)
                mean_bce = _mean([bce(shard.clean, shard_outputs.denoised) for shard, shard_outputs in pairs])
                # At the scale of the loss, since after larger gradients Adam would long take smaller steps.
                scale = tf.stop_gradient(tf.math.divide_no_nan(tf.abs(mean_loss), mean_bce))
                minimized = objective.bce_share * scale * mean_bce + (1 - objective.bce_share) * mean_loss
        # A loss of the latents alone does not depend on the decoder.
        gradients = tape.gradient(minimized, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradient_norm = tf.norm(flatten(gradients))
        finite = [
            tf.debugging.assert_all_finite(mean_loss, "the loss"),
            tf.debugging.assert_all_finite(gradient_norm, "the gradient"),
        ]
        with tf.control_dependencies(finite):
            if config.max_gradient_norm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, config.max_gradient_norm, use_norm=gradient_norm)
            before = flatten(weights)
            optimizer.apply(gradients, weights)
            means = dict(zip(objective.loss.names, losses, strict=True))
            means["gradient_norm"] = gradient_norm
            means["update_to_weight_ratio"] = tf.norm(flatten(weights) - before) / tf.norm(before)
            state.means.update(means, images=batch.clean.shape[0])
            if objective.loss.has_updates:
                latents = None if outputs[0].latents is None else tf.concat([one.latents for one in outputs], axis=0)
                together = Outputs(tf.concat([one.denoised for one in outputs], axis=0), latents)
                objective.update(fused(state.model), batch, together)
            state.step.assign_add(1)
            if config.ema_decay is not None:
                state.update_average(config.ema_decay)
        return mean_loss

    return train_step


def seed_layers(model: keras.Model, seed: tf.Tensor) -> None:
    """Set the seeds of layers such as Dropout, which change with every call, to functions of `seed`, int64 [2].

    So their random numbers depend on the step alone, and their state needs no saving.
    """
    saved = {id(weight) for weight in model.non_trainable_weights}
    states = [variable for variable in model.non_trainable_variables if id(variable) not in saved]
    for number, state in enumerate(states):
        # Below 2**31 - 1, the number for `second_noisy`, and above those of the shards.
        state.assign(tf.cast(tf.random.experimental.stateless_fold_in(seed, 2**30 + number), state.dtype))


def _mean(shards: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return the mean over the images of all shards, each [images]."""
    return tf.reduce_mean(tf.concat(shards, axis=0))


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
            batch = next(batches)
            # A static shape makes a step 7 % faster, and the graph of a user's noise may not know it.
            shape = [batch_size, *batch.clean.shape[1:]]
            noisy, clean = tf.ensure_shape(batch.noisy, shape), tf.ensure_shape(batch.clean, shape)
            noise_level = tf.ensure_shape(batch.noise_level, [batch_size, 1, 1, 1])
            mean_loss = train_step(Batch(noisy, clean, noise_level, batch.seed))
        return mean_loss

    return train_loop
