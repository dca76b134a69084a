"""The train state: everything that changes while a run trains, and so exactly what a checkpoint saves."""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from dae.losses.composite import CompositeLoss


class RunningMeans(tf.Module):
    """Means over the images of the current epoch, accumulated in float64."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self.sums = tf.Variable(tf.zeros([len(self._names)], tf.float64))
        self.images = tf.Variable(0, dtype=tf.int64)

    def update(self, means: Mapping[str, tf.Tensor], images: int) -> None:
        """Add the means over a batch of `images` images, a scalar for each name."""
        values = tf.cast(tf.stack([means[name] for name in self._names]), tf.float64)
        self.sums.assign_add(values * images)
        self.images.assign_add(images)

    def result(self) -> dict[str, float]:
        """Return the mean of each name over the images of all updates, at least one."""
        return dict(zip(self._names, (self.sums.numpy() / self.images.numpy()).tolist(), strict=True))

    def reset(self) -> None:
        """Start over, at the end of an epoch."""
        self.sums.assign(tf.zeros_like(self.sums))
        self.images.assign(0)


class TrainState(tf.train.Checkpoint):
    """Model, average of its weights, loss, optimizer, step, running means, seconds and best result of a run.

    The order of the images and the noise are functions of the step, so nothing else needs to be saved for them.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: CompositeLoss,
        optimizer: keras.optimizers.Optimizer,
        average: keras.Model | None = None,
    ) -> None:
        """Create the state before step 0. The weights of `loss`, if it has any, must exist.

        `average` is the same network as `model`, for the moving average of the weights.
        """
        # Keras creates an optimizer's variables late; without them a checkpoint would be restored without an error but
        # incompletely (keras#19389).
        optimizer.build([*model.trainable_variables, *loss.trainable_variables])
        super().__init__(
            model=model,
            **({} if average is None else {"average": average}),
            loss=loss.layers,  # with all their weights, and the optimizers that train some
            optimizer=optimizer,
            step=tf.Variable(0, dtype=tf.int64),  # steps done
            means=RunningMeans((*loss.names, "gradient_norm", "update_to_weight_ratio")),
            seconds=tf.Variable(0.0, dtype=tf.float64),  # spent on the current epoch, by all processes
            best_loss=tf.Variable(float("inf"), dtype=tf.float64),  # lowest validation loss
            best_epoch=tf.Variable(0, dtype=tf.int64),  # the epoch, from 1, that reached it
        )
        self._composite_loss = loss

    def update_average(self, decay: float) -> None:
        """Move each weight of `average` towards that of `model`, by 1 - decay.

        In the first steps the decay is (1 + step) / (10 + step), so that the initial weights are soon forgotten.
        Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`.
        """
        step = tf.cast(self.step, tf.float32)
        share = 1 - tf.minimum(decay, (1 + step) / (10 + step))
        for average, weight in zip(self.average.weights, self.model.weights, strict=True):
            average.assign_add(share * (weight - average))

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """What the optimizer trains: the weights of the network and of the loss."""
        return [*self.model.trainable_variables, *self._composite_loss.trainable_variables]

    def start_epoch(self) -> None:
        """Reset what belongs to one epoch."""
        self.means.reset()
        self.seconds.assign(0)
