"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024); names follow the authors' code.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

# The eigenvectors are computed again after this many steps.
PRECONDITION_FREQUENCY = 10
# This is the decay rate of the running means of G G^T and G^T G.
SHAMPOO_BETA = 0.95
# Sides of a kernel that are longer are not preconditioned, because the time for eigenvectors grows with the third power
# of the length. The 3 x 3 kernels of 32 channels, with 288 rows, are preconditioned on both sides.
MAX_PRECONDITION_DIM = 300


class Preconditioner(NamedTuple):
    """The state of one side, rows or columns, of a kernel: two matrices [length, length]."""

    GG: keras.Variable
    """Running mean of G G^T for the rows, or of G^T G for the columns."""
    Q: keras.Variable
    """Eigenvectors of GG when they were last computed; the identity before the first time."""


class Soap(keras.optimizers.Adam):
    """Adam in the eigenbasis of the two second-moment matrices of each kernel's gradient; plain Adam for biases.

    A kernel [height, width, in, out] is treated as a matrix [height * width * in, out] with the gradient G. Adam scales
    each entry of the gradient by the magnitude of that entry alone, which works best for entries that are uncorrelated;
    in the eigenbasis of the running means of G G^T and G^T G, they nearly are.

    Differences from the authors' code: eigenvectors are computed exactly instead of by power iteration, the steps
    before they are first computed are those of Adam, and SHAMPOO_BETA is independent of beta_2. Unlike with Adam, a
    weight whose gradient is 0 can change slightly, because of rounding. A training step of `conv` takes a tenth longer
    than with Adam.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        """Create Adam's moments and the preconditioners of both sides of each kernel."""
        if self.built:
            return
        super().build(variables)
        self._preconditioners = [
            [self._preconditioner(variable, length) for length in _as_matrix(variable).shape] for variable in variables
        ]

    def _preconditioner(self, variable: keras.Variable, length: int) -> Preconditioner | None:
        if len(variable.shape) == 1 or not 1 < length <= MAX_PRECONDITION_DIM:
            return None
        return Preconditioner(
            GG=self.add_variable((length, length), "zeros", name=f"{variable.name}_GG"),
            Q=self.add_variable((length, length), "identity", name=f"{variable.name}_Q"),
        )

    def apply(self, grads: list[tf.Tensor], trainable_variables: list[keras.Variable] | None = None) -> None:
        """Update the variables and, every PRECONDITION_FREQUENCY steps, the eigenvectors for the following steps."""
        super().apply(grads, trainable_variables)
        tf.cond(self.iterations % PRECONDITION_FREQUENCY == 0, self._update_eigenvectors, lambda: None)

    def _update_eigenvectors(self) -> None:
        for sides in self._preconditioners:
            for side in filter(None, sides):
                side.Q.assign(tf.linalg.eigh(side.GG)[1])

    # Like Keras's own optimizers, this reads private attributes of the base class, for a variable's moments and its
    # index.
    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Update `variable`; the first moment is kept in the original basis, the second in the eigenbasis."""
        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, tf.float32)
        first, second, sides = self._momentums[index], self._velocities[index], self._preconditioners[index]
        matrix = _as_matrix(gradient)
        first.assign_add((1 - self.beta_1) * (gradient - first))
        projected_square = tf.reshape(tf.square(_project(matrix, sides)), gradient.shape)
        second.assign_add((1 - self.beta_2) * (projected_square - second))
        rate = learning_rate * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        projected_step = _project(_as_matrix(first), sides) / (tf.sqrt(_as_matrix(second)) + self.epsilon)
        variable.assign_sub(rate * tf.reshape(_project_back(projected_step, sides), gradient.shape))
        for side, lines in zip(sides, (matrix, tf.transpose(matrix)), strict=True):
            if side is not None:
                product = tf.matmul(lines, lines, transpose_b=True)
                side.GG.assign_add((1 - SHAMPOO_BETA) * (product - side.GG))


def _as_matrix(kernel: tf.Tensor | tf.Variable | keras.Variable) -> tf.Tensor:
    return tf.reshape(kernel, [-1, kernel.shape[-1]])


def _project(matrix: tf.Tensor, sides: list[Preconditioner | None]) -> tf.Tensor:
    """Return `matrix` in the eigenbasis of its sides."""
    rows, columns = sides
    if rows is not None:
        matrix = tf.matmul(rows.Q, matrix, transpose_a=True)
    return matrix if columns is None else tf.matmul(matrix, columns.Q)


def _project_back(matrix: tf.Tensor, sides: list[Preconditioner | None]) -> tf.Tensor:
    """Return `matrix`, given in the eigenbasis, in the original basis."""
    rows, columns = sides
    if rows is not None:
        matrix = tf.matmul(rows.Q, matrix)
    return matrix if columns is None else tf.matmul(matrix, columns.Q, transpose_b=True)
