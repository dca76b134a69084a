"""Adam on all weights at once."""

import math

import keras
import tensorflow as tf


class Adam(keras.optimizers.Optimizer):
    """Keras's Adam, computed on one vector of all weights.

    Keras takes many small operations for each weight tensor; on one vector, a training step of `conv` takes 3.5 % less
    time.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization (2015), in the formulation of its section 2, as in
    Keras.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=type(self).__name__.lower())
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the moments: running means of the gradient and of its square, one vector each."""
        if self.built:
            return
        super().build(variables)
        self.sizes = [math.prod(variable.shape) for variable in variables]
        self.momentum = self.add_variable((sum(self.sizes),), "zeros", name="momentum")
        self.velocity = self.add_variable((sum(self.sizes),), "zeros", name="velocity")

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: list[tf.Tensor], trainable_variables: list[keras.Variable] | None = None) -> None:
        """Update the variables, which must be those that the optimizer was built with, in the same order."""
        rate = self.update_moments(flatten(grads), tf.square(flatten(grads)))
        update = rate * self.momentum / (tf.sqrt(self.velocity) + self.epsilon)
        for variable, change in zip(trainable_variables or [], tf.split(update, self.sizes), strict=True):
            variable.assign_sub(tf.reshape(change, variable.shape))

    def update_moments(self, gradient: tf.Tensor, square: tf.Tensor) -> tf.Tensor:
        """Count a step, update the moments with the gradient and its square, and return the step's learning rate.

        The rate includes the correction for moments that start at zero.
        """
        rate = tf.cast(self.learning_rate, tf.float32)
        self.iterations.assign_add(1)
        step = tf.cast(self.iterations, tf.float32)
        self.momentum.assign_add((1 - self.beta_1) * (gradient - self.momentum))
        self.velocity.assign_add((1 - self.beta_2) * (square - self.velocity))
        return rate * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)


@tf.autograph.experimental.do_not_convert
def flatten(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Return all values as one vector."""
    with tf.name_scope("flatten"):
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
