"""The train state: everything that changes while a run trains, and so exactly what a checkpoint saves."""

import time
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from dae.losses.composite import CompositeLoss
from dae.optimizers.adam import flatten


class RunningMeans(tf.Module):
    """Means over the images of the current epoch, accumulated in float64."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self.sums = tf.Variable(tf.zeros([len(self._names)], tf.float64))
        self.images = tf.Variable(0, dtype=tf.int64)

    @tf.autograph.experimental.do_not_convert
    def update(self, means: Mapping[str, tf.Tensor], num_images: int) -> None:
        """Add the means over a batch of `num_images` images, a scalar for each name."""
        values = tf.cast(tf.stack([means[name] for name in self._names]), tf.float64)
        self.sums.assign_add(values * num_images)
        self.images.assign_add(num_images)

    def result(self) -> dict[str, float]:
        """Return the mean of each name over the images of all updates, at least one."""
        return dict(zip(self._names, (self.sums.numpy() / self.images.numpy()).tolist(), strict=True))

    def reset(self) -> None:
        """Start over, at the end of an epoch."""
        self.sums.assign(tf.zeros_like(self.sums))
        self.images.assign(0)


class TrainState(tf.train.Checkpoint):
    """Model, average of its weights, loss, optimizer, step, running means, seconds and best result of a run.

    Shuffling and noise are functions of the step, so nothing else needs to be saved for them.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: CompositeLoss,
        optimizer: keras.optimizers.Optimizer,
        max_gradient_norm: float | None = None,
        averaged_model: keras.Model | None = None,
        ema_decay: float | None = None,
    ) -> None:
        """Create the state before step 0. The weights of `loss`, if it has any, must exist.

        Gradients of a global norm above `max_gradient_norm` are scaled down to it. `averaged_model` is the same network
        as `model`, for the exponential moving average of its weights with the decay `ema_decay` per step.
        """
        # Keras creates optimizers' variables lazily; without them a checkpoint would be restored without an error but
        # incompletely (keras#19389).
        optimizer.build([*model.trainable_variables, *loss.trainable_variables])
        super().__init__(
            model=model,
            **({} if averaged_model is None else {"average": averaged_model}),
            loss=loss.layers,  # with all their weights, and the optimizers that train some
            optimizer=optimizer,
            step=tf.Variable(0, dtype=tf.int64),  # steps done
            means=RunningMeans((*loss.names, "gradient_norm", "update_to_weight_ratio")),
            seconds=tf.Variable(0.0, dtype=tf.float64),  # spent on the current epoch, also before a resume
            best_value=tf.Variable(float("inf"), dtype=tf.float64),  # lowest value of `Task.criterion`
            best_epoch=tf.Variable(0, dtype=tf.int64),  # the epoch, from 1, that reached it
        )
        self._composite_loss, self._max_gradient_norm, self._ema_decay = loss, max_gradient_norm, ema_decay

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The variables that the optimizer trains: the weights of the network and of the loss."""
        return [*self.model.trainable_variables, *self._composite_loss.trainable_variables]

    def apply(
        self,
        gradients: list[tf.Tensor],
        statistics: Sequence[tf.Tensor],
        values: Mapping[str, tf.Tensor],
        num_images: int,
    ) -> None:
        """Take a step: clip the gradients, update the weights and their average, the running means, and the step.

        `statistics` are the new values of the model's non-trainable weights, such as moving averages. `values` are
        means over the batch of `num_images` images: those of the loss, and the `gradient_norm`, a scalar.
        """
        weights = self.trainable_variables
        for variable, value in zip(self.model.non_trainable_weights, statistics, strict=True):
            variable.assign(value)
        if self._max_gradient_norm is not None:
            norm = values["gradient_norm"]
            gradients, _ = tf.clip_by_global_norm(gradients, self._max_gradient_norm, use_norm=norm)
        before = flatten(weights)
        with tf.name_scope("optimizer"):
            self.optimizer.apply(gradients, weights)  # a user's can branch on tensors
        with tf.name_scope("running_means"):
            ratio = tf.norm(flatten(weights) - before) / tf.norm(before)
            self.means.update({**values, "update_to_weight_ratio": ratio}, num_images)
        self.step.assign_add(1)
        if self._ema_decay is not None:
            self._update_average()

    @tf.autograph.experimental.do_not_convert
    def _update_average(self) -> None:
        """Move each weight of `average` towards that of `model`, by 1 - decay.

        In the first steps the decay is (1 + step) / (10 + step), so that the initial weights are soon forgotten.
        Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`.
        """
        step = tf.cast(self.step, tf.float32)
        fraction = 1 - tf.minimum(self._ema_decay, (1 + step) / (10 + step))
        for average, weight in zip(self.average.weights, self.model.weights, strict=True):
            average.assign_add(fraction * (weight - average))

    def epoch_means(self) -> dict[str, float]:
        """Return the means of the epoch so far: `train_loss` and so on, `gradient_norm`, `update_to_weight_ratio`."""
        names = self._composite_loss.names
        return {f"train_{name}" if name in names else name: mean for name, mean in self.means.result().items()}

    def stops_early(self, epoch: int, patience: int | None) -> bool:
        """Return whether to stop before `epoch`, because `Task.criterion` has not improved for `patience` epochs."""
        return patience is not None and epoch > patience + int(self.best_epoch)

    def start_epoch(self) -> None:
        """Reset what belongs to one epoch."""
        self.means.reset()
        self.seconds.assign(0)


class Stopwatch:
    """Accumulates the seconds of an epoch in the train state, so that the time before a resume is counted too."""

    def __init__(self, state: TrainState) -> None:
        """Start the watch."""
        self._state, self._images = state, int(state.means.images)
        self._started = self._last = time.monotonic()

    def update(self) -> float:
        """Add the time since the last update to the state, and return the seconds of the epoch so far."""
        now = time.monotonic()
        # An array, because TensorFlow keeps a tensor for every Python number that it converts, until the process ends.
        self._state.seconds.assign_add(np.array(now - self._last))
        self._last = now
        return float(self._state.seconds)

    def images_per_second(self) -> float:
        """Return the training images per second between the start of the watch and its last update."""
        return (int(self._state.means.images) - self._images) / (self._last - self._started)


def global_norm(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Return the L2 norm of all values of the tensors together, a scalar."""
    with tf.name_scope("global_norm"):
        return tf.norm(flatten(tensors))
