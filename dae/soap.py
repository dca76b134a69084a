"""SOAP: Adam along axes that each kernel's own gradients choose."""

import keras
import tensorflow as tf

# Steps from one choice of axes to the next.
AXES_EVERY = 10
# How slowly the covariances forget past gradients.
COVARIANCE_BETA = 0.95
# A longer side of a kernel keeps its axes: to find others takes time with the third power of it.
LONGEST_SIDE = 256


class Soap(keras.optimizers.Adam):
    """Adam in the eigenvectors of the two covariances of each kernel's gradient; plain Adam for biases.

    A kernel [height, width, in, out] is a matrix [height * width * in, out] here, and its gradient G has a covariance
    of its rows, the mean of G G^T, and one of its columns, the mean of G^T G. Adam scales every entry by its own size
    alone, which serves best where entries do not move together; along the eigenvectors they do so least. Source:
    Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024), but with the eigenvectors themselves where
    it takes a step of power iteration towards them.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes Adam's moments, and for each side of each kernel a covariance and axes; None where it has none."""
        if self.built:
            return
        super().build(variables)
        self._covariances = [self._squares(variable, "zeros", "covariance") for variable in variables]
        self._axes = [self._squares(variable, "identity", "axes") for variable in variables]

    def _squares(self, variable: keras.Variable, initializer: str, name: str) -> list[keras.Variable | None]:
        is_kernel = len(variable.shape) > 1
        return [
            self.add_variable((side, side), initializer, name=f"{variable.name}_{name}")
            if is_kernel and side <= LONGEST_SIDE
            else None
            for side in _as_matrix(variable).shape
        ]

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Moves `variable`; the first moment is kept along the kernel's own axes, the second along the chosen ones."""
        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, tf.float32)
        first, second, axes = self._momentums[index], self._velocities[index], self._axes[index]
        first.assign_add((1 - self.beta_1) * (gradient - first))
        turned_square = tf.reshape(tf.square(_turned(_as_matrix(gradient), axes)), gradient.shape)
        second.assign_add((1 - self.beta_2) * (turned_square - second))
        rate = learning_rate * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        turned_step = _turned(_as_matrix(first), axes) / (tf.sqrt(_as_matrix(second)) + self.epsilon)
        variable.assign_sub(rate * tf.reshape(_turned(turned_step, axes, back=True), gradient.shape))
        # After the move, as in the paper: along axes that came of this gradient alone, it would be all zeros but for
        # rounding, which Adam would make as large as the rest.
        self._choose_axes(_as_matrix(gradient), self._covariances[index], axes)

    def _choose_axes(
        self, gradient: tf.Tensor, covariances: list[keras.Variable | None], axes: list[keras.Variable | None]
    ) -> None:
        products = (tf.matmul(gradient, gradient, transpose_b=True), tf.matmul(gradient, gradient, transpose_a=True))
        for product, covariance, side in zip(products, covariances, axes, strict=True):
            if covariance is not None:
                covariance.assign_add((1 - COVARIANCE_BETA) * (product - covariance))
                side.assign(
                    tf.cond(
                        (self.iterations + 1) % AXES_EVERY == 0,
                        lambda covariance=covariance: tf.linalg.eigh(covariance)[1],
                        lambda side=side: tf.convert_to_tensor(side),
                    )
                )


def _as_matrix(kernel: tf.Tensor | keras.Variable) -> tf.Tensor:
    return tf.reshape(kernel, [-1, kernel.shape[-1]])


def _turned(matrix: tf.Tensor, axes: list[keras.Variable | None], back: bool = False) -> tf.Tensor:
    """`matrix` as seen along `axes`, or from there back."""
    rows, columns = axes
    if rows is not None:
        matrix = tf.matmul(rows, matrix, transpose_a=not back)
    if columns is not None:
        matrix = tf.matmul(matrix, columns, transpose_b=back)
    return matrix
