"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024); names follow the authors' code.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from dae.optimizers.adam import Adam, flatten

# The eigenvectors are computed again after this many steps.
PRECONDITION_FREQUENCY = 10
# This is the decay rate of the running means of the second moments.
SHAMPOO_BETA = 0.95
# Longer axes are not preconditioned, because the time for eigenvectors grows with the third power of the length.
MAX_PRECONDITION_DIM = 300


class Preconditioner(NamedTuple):
    """The state of one axis of a kernel: two matrices [length, length]."""

    GG: keras.Variable
    """Running mean of the second moments of the gradient between the indices of this axis."""
    Q: keras.Variable
    """Eigenvectors of GG when they were last computed; the identity before the first time."""


class Soap(Adam):
    """Adam in the eigenbases of the second moments of each kernel's gradient; plain Adam for biases.

    The gradient of a kernel [height, width, in, out] is taken as G [height * width, in, out]. Each of these three axes
    has a matrix of second moments, such as G^T G for the outputs of a matrix G [in, out], summed over the other axes.
    Adam scales each entry of the gradient by the magnitude of that entry alone, which works best for entries that are
    uncorrelated; in the eigenbases of the running means of these matrices, they nearly are.

    Differences from the authors' code: rows and columns of a kernel's window are one axis, eigenvectors are computed
    exactly instead of by power iteration, the steps before they are first computed are those of Adam, and SHAMPOO_BETA
    is independent of beta_2. Unlike with Adam, a weight whose gradient is 0 can change slightly, because of rounding.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        """Create Adam's moments and the preconditioners of the axes of each kernel."""
        if self.built:
            return
        super().build(variables)
        self.preconditioners = [
            [self._preconditioner(variable, length) for length in _with_three_axes(variable).shape]
            for variable in variables
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
        gradients = [_with_three_axes(gradient) for gradient in grads]
        projected = [_project(gradient, axes) for gradient, axes in zip(gradients, self.preconditioners, strict=True)]
        # The momentum is kept in the original basis, the velocity in the eigenbasis.
        rate = self.update_moments(flatten(gradients), tf.square(flatten(projected)))
        moments = zip(tf.split(self.momentum, self.sizes), tf.split(self.velocity, self.sizes), strict=True)
        for variable, gradient, (momentum, velocity), axes in zip(
            trainable_variables or [], gradients, moments, self.preconditioners, strict=True
        ):
            momentum, velocity = tf.reshape(momentum, gradient.shape), tf.reshape(velocity, gradient.shape)
            step = _project(_project(momentum, axes) / (tf.sqrt(velocity) + self.epsilon), axes, back=True)
            variable.assign_sub(rate * tf.reshape(step, variable.shape))
            for preconditioner, equation in zip(axes, ("aio,bio->ab", "aio,ajo->ij", "aio,aip->op"), strict=True):
                if preconditioner is not None:
                    second_moments = tf.einsum(equation, gradient, gradient)
                    preconditioner.GG.assign_add((1 - SHAMPOO_BETA) * (second_moments - preconditioner.GG))
        tf.cond(self.iterations % PRECONDITION_FREQUENCY == 0, self._update_eigenvectors, lambda: None)

    def _update_eigenvectors(self) -> None:
        for axes in self.preconditioners:
            for preconditioner in filter(None, axes):
                preconditioner.Q.assign(tf.linalg.eigh(preconditioner.GG)[1])


def _with_three_axes(kernel: tf.Tensor | tf.Variable | keras.Variable) -> tf.Tensor:
    """Return a kernel [..., in, out] as [window, in, out]; a matrix or a vector gets axes of length 1 in front."""
    return tf.reshape(kernel, [-1, *(1, 1, *kernel.shape)[-2:]])


def _project(tensor: tf.Tensor, axes: list[Preconditioner | None], back: bool = False) -> tf.Tensor:
    """Return `tensor` in the eigenbases of its axes; with `back`, from there in the original basis."""
    window, inputs, outputs = axes
    if window is not None:
        tensor = tf.tensordot(window.Q, tensor, axes=[[1 if back else 0], [0]])
    if inputs is not None:
        tensor = tf.matmul(inputs.Q, tensor, transpose_a=not back)
    return tensor if outputs is None else tf.matmul(tensor, outputs.Q, transpose_b=back)
