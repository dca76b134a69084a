"""SOAP: Adam along axes that each kernel's own gradients choose."""

import itertools
from typing import NamedTuple

import keras
import tensorflow as tf

# Steps from one choice of axes to the next.
AXES_EVERY = 10
# How slowly the covariances forget past gradients.
COVARIANCE_BETA = 0.95
# A longer side of a kernel keeps its axes: to find others takes time with the third power of it.
LONGEST_SIDE = 256


class Side(NamedTuple):
    """What is known of one side of a kernel, `length` long: two matrices [length, length]."""

    covariance: keras.Variable
    axes: keras.Variable


class Soap(keras.optimizers.Adam):
    """Adam in the eigenvectors of the two covariances of each kernel's gradient; plain Adam for biases.

    A kernel [height, width, in, out] is a matrix [height * width * in, out] here, and its gradient G has a covariance
    of its rows, the mean of G G^T, and one of its columns, the mean of G^T G. Adam scales every entry by its own size
    alone, which serves best where entries do not move together; along the eigenvectors they do so least.

    Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024). In place of its step of power
    iteration towards the eigenvectors, these are computed; until they first are, it is Adam; the covariances forget at
    a rate of their own. Unlike with Adam, weights without any gradient may move a little, by rounding. A training step
    of `conv` takes a tenth longer.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes Adam's moments, and what is kept of the two sides of each kernel; None of one that keeps its axes."""
        if self.built:
            return
        super().build(variables)
        self._sides = [
            [self._side(variable, length) for length in _as_matrix(variable).shape] for variable in variables
        ]

    def _side(self, variable: keras.Variable, length: int) -> Side | None:
        if len(variable.shape) == 1 or not 1 < length <= LONGEST_SIDE:
            return None
        return Side(
            covariance=self.add_variable((length, length), "zeros", name=f"{variable.name}_covariance"),
            axes=self.add_variable((length, length), "identity", name=f"{variable.name}_axes"),
        )

    def apply(self, grads: list[tf.Tensor], trainable_variables: list[keras.Variable] | None = None) -> None:
        """Moves the variables, and then, from time to time, chooses axes for the steps to come."""
        super().apply(grads, trainable_variables)
        tf.cond(self.iterations % AXES_EVERY == 0, self._choose_axes, lambda: None)

    def _choose_axes(self) -> None:
        for side in itertools.chain.from_iterable(self._sides):
            if side is not None:
                side.axes.assign(tf.linalg.eigh(side.covariance)[1])

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Moves `variable`; the first moment is kept along the kernel's own axes, the second along the chosen ones."""
        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, tf.float32)
        first, second, sides = self._momentums[index], self._velocities[index], self._sides[index]
        matrix = _as_matrix(gradient)
        first.assign_add((1 - self.beta_1) * (gradient - first))
        turned_square = tf.reshape(tf.square(_turned(matrix, sides)), gradient.shape)
        second.assign_add((1 - self.beta_2) * (turned_square - second))
        rate = learning_rate * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        turned_step = _turned(_as_matrix(first), sides) / (tf.sqrt(_as_matrix(second)) + self.epsilon)
        variable.assign_sub(rate * tf.reshape(_turned(turned_step, sides, back=True), gradient.shape))
        for side, lines in zip(sides, (matrix, tf.transpose(matrix)), strict=True):
            if side is not None:
                product = tf.matmul(lines, lines, transpose_b=True)
                side.covariance.assign_add((1 - COVARIANCE_BETA) * (product - side.covariance))


def _as_matrix(kernel: tf.Tensor | tf.Variable | keras.Variable) -> tf.Tensor:
    return tf.reshape(kernel, [-1, kernel.shape[-1]])


def _turned(matrix: tf.Tensor, sides: list[Side | None], back: bool = False) -> tf.Tensor:
    """`matrix` as seen along the axes of its sides, or from there back."""
    rows, columns = sides
    if rows is not None:
        matrix = tf.matmul(rows.axes, matrix, transpose_a=not back)
    if columns is not None:
        matrix = tf.matmul(matrix, columns.axes, transpose_b=back)
    return matrix
