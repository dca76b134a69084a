"""The train step: what one batch does to the weights. It computes only; nothing is written or printed here."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dae.layers import fused
from dae.losses import WeightedSum
from dae.pipeline import micro_batches

TrainStep = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def make_train_step(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: WeightedSum, state: Any, parts: int = 1
) -> TrainStep:
    """The step `(noisy, clean) -> mean loss of the batch` that trains `model` and counts in `Checkpoints.state`.

    The batch is computed as `parts` micro-batches side by side, which changes nothing but the last bits. Raises
    InvalidArgumentError, before any weight changes, where the loss or its gradient is not finite.
    """
    denoise = fused(model)

    @tf.function
    def train_step(noisy: tf.Tensor, clean: tf.Tensor) -> tf.Tensor:
        all_losses, all_gradients = [], []
        for some_noisy, some_clean in micro_batches(parts, noisy, clean):
            with tf.GradientTape() as tape:
                losses = loss(some_clean, denoise(some_noisy))
                share_of_mean = tf.reduce_sum(losses["loss"]) / clean.shape[0]
            all_losses.append(tf.stack(list(losses.values())))
            all_gradients.append(tape.gradient(share_of_mean, model.trainable_variables))
        losses = tf.concat(all_losses, axis=1)  # [the whole and its terms, batch]
        mean_loss = tf.reduce_mean(losses[0])
        gradients = [tf.add_n(of_one_variable) for of_one_variable in zip(*all_gradients, strict=True)]
        finite = [
            tf.debugging.assert_all_finite(mean_loss, "the loss"),
            tf.debugging.assert_all_finite(tf.linalg.global_norm(gradients), "the gradient"),
        ]
        with tf.control_dependencies(finite):
            optimizer.apply(gradients, model.trainable_variables)
            state.step.assign_add(1)
            state.loss_sums.assign_add(tf.reduce_sum(tf.cast(losses, tf.float64), axis=1))
            state.images.assign_add(tf.size(losses[0], tf.int64))
        return mean_loss

    return train_step
