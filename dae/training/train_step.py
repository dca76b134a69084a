"""The gradient computation: what one batch does to the train state. Nothing is read, written or printed here."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dae.config import RunConfig
from dae.data.pipeline import Batch, shard_sizes, split_batch
from dae.losses.losses import bce
from dae.losses.objective import Objective
from dae.models.fused_layers import Outputs, fused
from dae.models.precision import in_precision
from dae.optimizers.adam import flatten
from dae.replicas import ALONE, Replicas
from dae.training.train_state import TrainState

TrainStep = Any  # a tf.function, which mypy does not know
TrainLoop = Callable[[Iterator[Batch], tf.Tensor, int], tf.Tensor]


def make_train_step(
    state: TrainState, objective: Objective, config: RunConfig, mixes_bce: bool = True, replicas: Replicas = ALONE
) -> TrainStep:
    """Return the function `(batch, batch_size) -> mean loss of the batch` that takes one step of `state`.

    The batch is divided into `config.shards` parts, whose gradients are computed in parallel and added in a fixed
    order. The function takes the images of the shards of this worker; `batch_size` counts those of all workers, and can
    be omitted if there are no others. While bce fades into the loss, each shard has its own scale for it. Without
    `mixes_bce`, bce is not computed, as after the first `config.bce_steps`. Raises InvalidArgumentError, before any
    weight changes, if the loss or its gradient is not finite.
    """
    optimizer, names, shards = state.optimizer, objective.loss.names, config.shards or 1
    numbers, moving = replicas.shards(shards), state.model.non_trainable_weights
    # With float16, a step whose scaled gradient is not finite changes only the scale.
    is_scaled = config.precision == "float16"
    reduced = None if config.precision == "float32" else in_precision(state.model, config.precision)

    def shard_sums(shard: Batch, moving_before: list[tf.Tensor], batch_size: int) -> tuple[list[tf.Tensor], Outputs]:
        """Return the shard's part of the gradients, of the values of the loss, and of the changes of averages."""
        weights = state.trainable_variables
        seed_layers(state.model, shard.seed)
        for weight, before in zip(moving, moving_before, strict=True):
            weight.assign(before)
        with tf.GradientTape() as tape:
            outputs, values = objective(reduced or fused(state.model), shard)
            sums = [tf.reduce_sum(values[name]) / batch_size for name in names]
            minimized = sums[0]
            if mixes_bce and objective.starts_as_bce:
                bce_sum = tf.reduce_sum(bce(shard.clean, outputs.denoised)) / batch_size
                # At the scale of the loss, since after larger gradients Adam would long take smaller steps.
                scale = tf.stop_gradient(tf.math.divide_no_nan(tf.abs(minimized), bce_sum))
                minimized = objective.bce_share * scale * bce_sum + (1 - objective.bce_share) * minimized
            minimized = optimizer.scale_loss(minimized)
        # A loss of the latents alone does not depend on the decoder.
        gradients = tape.gradient(minimized, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]  # that of tf.gather is sparse
        share = shard.clean.shape[0] / batch_size
        changes = [share * (weight - before) for weight, before in zip(moving, moving_before, strict=True)]
        return [*gradients, *sums, *changes], outputs

    if config.compile:
        shard_sums = tf.function(shard_sums, jit_compile=True)

    @tf.function
    def train_step(batch: Batch, batch_size: int | None = None) -> tf.Tensor:
        batch_size = batch_size or batch.clean.shape[0]
        weights, moving_before = state.trainable_variables, [tf.identity(weight) for weight in moving]
        sums, outputs = [], []
        for place, shard in enumerate(split_batch(batch, shards, numbers, batch_size)):
            if shard.clean.shape[0]:
                with replicas.on_device(place, len(numbers)):
                    tensors, shard_outputs = shard_sums(shard, moving_before, batch_size)
                outputs.append(shard_outputs)
            else:
                tensors = [tf.zeros(weight.shape) for weight in weights] + [tf.zeros([])] * len(names)
                tensors += [tf.zeros(weight.shape) for weight in moving]
            sums.append(tensors)
        totals = replicas.sum(sums, exact=config.reduction == "exact")
        gradients, others = totals[: len(weights)], totals[len(weights) :]
        means = dict(zip(names, others, strict=False))
        mean_loss, gradient_norm = means["loss"], tf.norm(flatten(gradients))
        scale = optimizer.scale_loss(tf.constant(1.0))
        # The scale falls to a half for each gradient that is not finite, but not below 1 unless all of them are so.
        checked = gradient_norm if not is_scaled else tf.where(scale < 1, math.inf, scale)
        finite = [
            tf.debugging.assert_all_finite(mean_loss, "the loss"),
            tf.debugging.assert_all_finite(checked, "the gradient"),
        ]
        with tf.control_dependencies(finite):
            for weight, before, change in zip(moving, moving_before, others[len(names) :], strict=True):
                weight.assign(before + change)
            if config.max_gradient_norm is not None:
                limit = config.max_gradient_norm * scale if is_scaled else config.max_gradient_norm
                gradients, _ = tf.clip_by_global_norm(gradients, limit, use_norm=gradient_norm)
            before = flatten(weights)
            optimizer.apply(gradients, weights)
            if is_scaled:
                gradient_norm = tf.where(tf.math.is_finite(gradient_norm), gradient_norm / scale, 0.0)
            means["gradient_norm"] = gradient_norm
            means["update_to_weight_ratio"] = tf.norm(flatten(weights) - before) / tf.norm(before)
            state.means.update(means, images=batch_size)
            if objective.loss.has_updates:
                if not outputs:  # Of no images, for which TensorFlow cannot compute a network.
                    one = fused(state.model, training=False)(tf.zeros([1, *batch.noisy.shape[1:]]))
                    outputs.append(Outputs(*(None if part is None else part[:0] for part in one)))
                seed_layers(state.model, batch.seed)  # so that they do not depend on this worker's shards
                objective.update(fused(state.model), *whole(batch, outputs, batch_size))
            state.step.assign_add(1)
            if config.ema_decay is not None:
                state.update_average(config.ema_decay)
        return mean_loss

    def whole(batch: Batch, outputs: Sequence[Outputs], batch_size: int) -> tuple[Batch, Outputs]:
        """Return the images of all workers, and the network's outputs for them, given those of this worker's shards."""

        def gather(tensor: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(replicas.gather(tensor), [batch_size, *tensor.shape[1:]])

        noisy, clean, level = (gather(tensor) for tensor in batch[:3])
        denoised, latents = (
            None if parts[0] is None else gather(tf.concat(parts, axis=0)) for parts in zip(*outputs, strict=True)
        )
        return Batch(noisy, clean, level, batch.seed), Outputs(denoised, latents)

    return train_step


def seed_layers(model: keras.Model, seed: tf.Tensor) -> None:
    """Set the seeds of layers such as Dropout, which change with every call, to functions of `seed`, int64 [2].

    So their random numbers depend on the step and the shard alone, and their state needs no saving.
    """
    saved = {id(weight) for weight in model.non_trainable_weights}
    states = [variable for variable in model.non_trainable_variables if id(variable) not in saved]
    for number, state in enumerate(states):
        # Below 2**31 - 1, the number for `second_noisy`, and above those of the shards.
        state.assign(tf.cast(tf.random.experimental.stateless_fold_in(seed, 2**30 + number), state.dtype))


def make_train_loop(train_step: TrainStep, shards: int = 1, replicas: Replicas = ALONE) -> TrainLoop:
    """Return the function `(batches, num_steps, batch_size) -> mean loss of the last step` that takes several steps.

    `batches` is an iterator of a `tf.data` pipeline whose next `num_steps` batches have `batch_size` images, of which
    it holds those of this worker's shards. One call takes many steps because cores would otherwise wait for Python
    between two steps (docs/results.md, "Train loop").
    """

    @tf.function
    def train_loop(batches: Iterator[Batch], num_steps: tf.Tensor, batch_size: int) -> tf.Tensor:
        images = sum(shard_sizes(batch_size, shards, replicas.shards(shards)))
        mean_loss = tf.constant(0.0)
        for _ in tf.range(num_steps):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # fetch no batch ahead of its step
            batch = next(batches)
            # A static shape makes a step 7 % faster, and the graph of a user's noise may not know it.
            shape = [images, *batch.clean.shape[1:]]
            noisy, clean = tf.ensure_shape(batch.noisy, shape), tf.ensure_shape(batch.clean, shape)
            noise_level = tf.ensure_shape(batch.noise_level, [images, 1, 1, 1])
            mean_loss = train_step(Batch(noisy, clean, noise_level, batch.seed), batch_size)
        return mean_loss

    return train_loop
