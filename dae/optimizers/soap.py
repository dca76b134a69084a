"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024); names follow the authors' code.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from dae.optimizers.adam import Adam, flatten

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


class Soap(Adam):
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
        self.preconditioners = [
            [self._preconditioner(variable, length) for length in _as_matrix(variable).shape] for variable in variables
        ]

    def _preconditioner(self, variable: keras.Variable, length: int) -> Preconditioner | None:
        if len(variable.shape) == 1 or not 1 < length <= MAX_PRECONDITION_DIM:
            return None
        return Preconditioner(
            GG=self.add_variable((length, length), "zeros", name=f"{variable.name}_GG"),
            Q=self.add_variable((length, length), "identity", name=f"{variable.name}_Q"),
        )

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: list[tf.Tensor], trainable_variables: list[keras.Variable] | None = None) -> None:
        """Update the variables and, every PRECONDITION_FREQUENCY steps, the eigenvectors for the following steps.

        The variables must be those that the optimizer was built with, in the same order.
        """
        matrices = [_as_matrix(gradient) for gradient in grads]
        projected = [_project(matrix, sides) for matrix, sides in zip(matrices, self.preconditioners, strict=True)]
        # The momentum is kept in the original basis, the velocity in the eigenbasis.
        rate = self.update_moments(flatten(matrices), tf.square(flatten(projected)))
        moments = zip(tf.split(self.momentum, self.sizes), tf.split(self.velocity, self.sizes), strict=True)
        for variable, matrix, (momentum, velocity), sides in zip(
            trainable_variables or [], matrices, moments, self.preconditioners, strict=True
        ):
            momentum, velocity = tf.reshape(momentum, matrix.shape), tf.reshape(velocity, matrix.shape)
            step = _project(_project(momentum, sides) / (tf.sqrt(velocity) + self.epsilon), sides, back=True)
            variable.assign_sub(rate * tf.reshape(step, variable.shape))
            for side, lines in zip(sides, (matrix, tf.transpose(matrix)), strict=True):
                if side is not None:
                    product = tf.matmul(lines, lines, transpose_b=True)
                    side.GG.assign_add((1 - SHAMPOO_BETA) * (product - side.GG))
        tf.cond(self.iterations % PRECONDITION_FREQUENCY == 0, self._update_eigenvectors, lambda: None)

    def _update_eigenvectors(self) -> None:
        for sides in self.preconditioners:
            for side in filter(None, sides):
                side.Q.assign(tf.linalg.eigh(side.GG)[1])


def _as_matrix(kernel: tf.Tensor | tf.Variable | keras.Variable) -> tf.Tensor:
    """Return a kernel [..., out] as [rows, out], a bias as one row, and a scalar as [1, 1]."""
    return tf.reshape(kernel, [-1, kernel.shape[-1] if len(kernel.shape) else 1])


def _project(matrix: tf.Tensor, sides: list[Preconditioner | None], back: bool = False) -> tf.Tensor:
    """Return `matrix` in the eigenbasis of its sides; with `back`, from there in the original basis."""
    rows, columns = sides
    if rows is not None:
        matrix = tf.matmul(rows.Q, matrix, transpose_a=not back)
    return matrix if columns is None else tf.matmul(matrix, columns.Q, transpose_b=back)
