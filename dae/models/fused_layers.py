"""Networks as they are computed: by fused layers, which are faster on a CPU, with seeds, and in a run's precision."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dae.errors import UsageError, listed
from dae.models.sizes import fitting_size, foreign, replacement, view_of_any_size

# The name of the layer whose output is the latents.
ENCODER = "encoder"

# A network of these layers is computed layer by layer, some of them fused; any other one is called as it is.
_PLAIN = (
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.BatchNormalization,
    keras.layers.Concatenate,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.MaxPooling2D,
    keras.layers.ReLU,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)

Compute = Callable[[Any], tf.Tensor]


class Outputs(NamedTuple):
    """Denoised images, and latents, that a model computes from noisy images."""

    denoised: tf.Tensor
    """As the network returns them; those of a network that is not bounded can leave [0, 1]."""
    latents: tf.Tensor | None = None
    """The output of the layer `encoder`, or None if there is no such layer."""

    @property
    def images(self) -> tf.Tensor:
        """The denoised images, clipped to [0, 1]."""
        return tf.clip_by_value(self.denoised, 0.0, 1.0)


Network = Callable[[tf.Tensor], Outputs]
SeededNetwork = Callable[[tf.Tensor], Network]


def fused(model: keras.Model, training: bool = True) -> Network:
    """Return the function from noisy images to the outputs of `model`, with its layers fused where that is faster.

    The function uses the weights that `model` has when `fused` is called. A `tf.function` must therefore call `fused`
    in its body; one call suffices for all shards. Outputs agree with those of `model` to 1e-5. A model with other
    layers than plain ones, or that runs on a GPU, is called unchanged. In inference, layers that draw random numbers,
    such as that of a variational autoencoder, draw the same ones for every batch.

    Images can have another size than those that `model` was built for, if its layers allow it: they are mirrored at the
    bottom and right up to a size that fits, and the denoised images are cropped. If the graph does not know their size,
    it must fit.
    """
    is_plain = not tf.config.get_visible_devices("GPU") and _is_plain(model)
    network = _layer_by_layer(model, training) if is_plain else _unchanged(model, training)

    def padded(noisy: tf.Tensor) -> Outputs:
        if not training:
            seed_layers(model, tf.zeros([2], tf.int64))
        height, width = noisy.shape[1:3]
        if None in (height, width):
            return network(noisy)
        size = fitting_size(model, height, width)
        if size == (height, width):
            return network(noisy)
        for axis, side in enumerate((height, width)):  # not by tf.pad, which mirrors an image only once
            mirrored = np.pad(np.arange(side), (0, size[axis] - side), "symmetric")
            noisy = tf.gather(noisy, mirrored, axis=1 + axis)
        outputs = network(noisy)
        return outputs._replace(denoised=outputs.denoised[:, :height, :width])

    return padded


def outputs(model: keras.Model, noisy: tf.Tensor) -> np.ndarray:
    """Return the outputs of `model` itself in inference, [batch, H, W, C], with which those of `fused` must agree."""
    seed_layers(model, tf.zeros([2], tf.int64))
    return np.asarray(model(noisy, training=False))


def _unchanged(model: keras.Model, training: bool) -> Network:
    network = view_of_any_size(with_latents(model))
    return lambda noisy: Outputs(**network(noisy, training=training))


def with_latents(model: keras.Model) -> keras.Model:
    """Return a model of the same layers whose outputs are a dictionary with the fields of `Outputs`."""
    latents = [("latents", layer.output) for layer in model.layers if layer.name == ENCODER]
    return keras.Model(model.inputs[0], dict([("denoised", model.outputs[0]), *latents]))


def _layer_by_layer(model: keras.Model, training: bool) -> Network:
    layers = _without_input(model)
    compute: dict[str, Compute] = {
        layer.name: replacement(layer) or functools.partial(layer, training=training) for layer in layers
    }
    compute |= {layer.name: _transposed_convolution(layer) for layer in layers if _transposes(layer)}
    done: set[str] = set()
    for before, layer in _pairs(model):
        if before.name in done:  # a convolution can follow upsampling and precede pooling
            continue
        if _upsamples(before, layer):
            compute[before.name], compute[layer.name] = tf.identity, _upsampled_convolution(layer)
            done.add(layer.name)
        elif _pools(before, layer):
            compute[before.name], compute[layer.name] = tf.identity, _pooled_convolution(before, layer)

    def network(noisy: tf.Tensor) -> Outputs:
        values, latents = {id(model.inputs[0]): noisy}, None
        for layer in layers:
            inputs = keras.tree.map_structure(lambda tensor: values[id(tensor)], layer.input)
            with keras.name_scope(layer.name, caller=layer):
                values[id(layer.output)] = compute[layer.name](inputs)
            latents = values[id(layer.output)] if layer.name == ENCODER else latents
        return Outputs(values[id(model.outputs[0])], latents)

    return network


def _pairs(model: keras.Model) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """Return the layers whose output nothing but one other layer uses, each with that layer."""
    producers = {id(layer.output): layer for layer in _without_input(model) if layer.name != ENCODER}
    users: dict[int, list[keras.layers.Layer]] = {id(output): [] for output in model.outputs}
    for layer in _without_input(model):
        for tensor in keras.tree.flatten(layer.input):
            users.setdefault(id(tensor), []).append(layer)
    return [(producers[tensor], *using) for tensor, using in users.items() if tensor in producers and len(using) == 1]


def _without_input(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers in the order of their computation."""
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


def _is_plain(model: keras.Model) -> bool:
    """Return whether `model` maps images to images, in plain layers that are used once and add no losses of values."""
    layers = _without_input(model)
    if not layers or not all(type(layer) in _PLAIN and layer.activity_regularizer is None for layer in layers):
        return False
    # A layer has only its first output here, so the second one of a layer that is used twice is not among these. Nor is
    # that of an operation which is not a layer.
    known = {id(tensor) for tensor in (*model.inputs, *(layer.output for layer in layers))}
    used = keras.tree.flatten([*(layer.input for layer in layers), model.outputs])
    return all(id(tensor) in known for tensor in used)


def _upsamples(before: keras.layers.Layer, layer: keras.layers.Layer) -> bool:
    """Return whether `before` repeats each pixel 2 x 2 times and `layer` is a plain 3 x 3 convolution."""
    return (
        isinstance(before, keras.layers.UpSampling2D)
        and (before.size, before.interpolation) == ((2, 2), "nearest")
        and isinstance(layer, keras.layers.Conv2D)
        and (layer.kernel_size, layer.strides, layer.dilation_rate, layer.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and layer.padding in ("same", "valid")
        and before.data_format == layer.data_format == "channels_last"
    )


def _upsampled_convolution(layer: keras.layers.Conv2D) -> Compute:
    """Return the function of images [batch, H, W, C] that repeats each pixel 2 x 2 times and then applies `layer`.

    The upsampled image repeats pixels, so each output pixel depends on only 2 x 2 pixels of the small image, and the
    3 x 3 weights can be added up to 2 x 2 weights. Which are added depends on whether the output pixel's row and column
    are even or odd. One convolution of the small image computes the four cases as channels, and the upsampled
    image and its gradient are never computed. This saves a third of the time of a training step of `conv`, mostly in
    the last layer.
    """
    pad = 1 if layer.padding == "same" else 0
    # `rows` maps each row of the kernel to the row of the small image that it multiplies, for even and odd output rows.
    parity, tap = np.indices((2, 3))
    rows = np.zeros((2, 2 + pad, 3), np.float32)
    rows[parity, (parity + tap - pad) // 2 + pad, tap] = 1
    return _convolution_of_positions(layer, tf.convert_to_tensor(layer.kernel), rows, rows, layer.padding.upper())


def _convolution_of_positions(
    layer: keras.layers.Layer, kernel: tf.Tensor, rows: np.ndarray, columns: np.ndarray, padding: Any
) -> Compute:
    """Return the function of small images that computes the positions of `_kernel_of_positions` by one convolution.

    They are computed as channels; then follow the bias and the activation of `layer`.
    """
    small_kernel, factor = _kernel_of_positions(kernel, rows, columns), len(rows)
    bias = tf.tile(tf.convert_to_tensor(layer.bias), [factor**2]) if layer.use_bias else None

    def compute(x: tf.Tensor) -> tf.Tensor:
        x = tf.nn.conv2d(x, small_kernel, strides=1, padding=padding)
        return layer.activation(_pixels_from_channels(x if bias is None else tf.nn.bias_add(x, bias), factor))

    return compute


def _kernel_of_positions(kernel: tf.Tensor, rows: np.ndarray, columns: np.ndarray) -> tf.Tensor:
    """Return the kernel [u, v, in, a * b * out] that computes a * b output positions of `kernel` [h, w, in, out].

    `rows` [a, u, h] and `columns` [b, v, w] say which of its rows and columns each position adds up. This is
    einsum("auh,bvw,hwio->uviabo"), as one product of matrices, because it is computed for each shard.
    """
    (a, u, h), (b, v, w) = rows.shape, columns.shape
    matrix = np.einsum("auh,bvw->uvabhw", rows, columns).reshape(-1, h * w)
    inputs, outputs = kernel.shape[2:]
    product = tf.matmul(matrix, tf.reshape(kernel, [h * w, inputs * outputs]))
    positions = tf.transpose(tf.reshape(product, [u, v, a * b, inputs, outputs]), [0, 1, 3, 2, 4])
    return tf.reshape(positions, [u, v, inputs, a * b * outputs])


def _pixels_from_channels(x: tf.Tensor, factor: int) -> tf.Tensor:
    """Return the same as `tf.nn.depth_to_space(x, s)`, from [batch, H, W, s s C] to [batch, s H, s W, C].

    TensorFlow's operation is slow for C = 1, and its gradient is even slower; this implementation saves 5 % of the time
    of a training step of `conv`.
    """
    _, height, width, channels = keras.ops.shape(x)  # numbers if the graph knows the shape
    channels //= factor**2
    x = tf.reshape(x, [-1, height, width, factor, factor, channels])
    return tf.reshape(tf.transpose(x, [0, 1, 3, 2, 4, 5]), [-1, factor * height, factor * width, channels])


def _transposes(layer: keras.layers.Layer) -> bool:
    """Return whether `layer` is a transposed convolution that multiplies the sides by its stride."""
    return (
        isinstance(layer, keras.layers.Conv2DTranspose)
        and layer.strides[0] == layer.strides[1] <= min(layer.kernel_size)
        and (layer.padding, layer.output_padding, layer.dilation_rate) == ("same", None, (1, 1))
        and layer.data_format == "channels_last"
    )


def _transposed_convolution(layer: keras.layers.Conv2DTranspose) -> Compute:
    """Return the function of images [batch, H, W, C] that applies `layer`.

    With the stride s, the output pixels of each of the s x s positions relative to an input pixel are a convolution of
    the small image, with every s-th row and column of the kernel. One convolution computes them all as channels. This
    saves 7 % of the time of a training step of `patches`, and 2 % of that of `unet`.
    """
    stride, _ = layer.strides

    def taps(size: int) -> tuple[np.ndarray, int]:
        """Return which row of the kernel each output position multiplies, and the offset of the first input row."""
        before = (size - stride) // 2
        first, last = -((size - 1 - before) // stride), (stride - 1 + before) // stride
        position, offset, row = np.indices((stride, last - first + 1, size))
        return (row == position + before - stride * (offset + first)).astype(np.float32), first

    (rows, first_row), (columns, first_column) = map(taps, layer.kernel_size)
    height, width = rows.shape[1], columns.shape[1]
    padding: Any = [[0, 0], [-first_row, height - 1 + first_row], [-first_column, width - 1 + first_column], [0, 0]]
    if (-first_row, -first_column) == ((height - 1) // 2, (width - 1) // 2):
        padding = "SAME"  # the same numbers, but only so does oneDNN compute the gradients
    kernel = tf.transpose(tf.convert_to_tensor(layer.kernel), [0, 1, 3, 2])
    return _convolution_of_positions(layer, kernel, rows, columns, padding)


def _pools(layer: keras.layers.Layer, pooling: keras.layers.Layer) -> bool:
    """Return whether `layer` is a convolution with ReLU and `pooling` takes the maximum of its output."""
    return (
        isinstance(layer, keras.layers.Conv2D)
        and isinstance(pooling, keras.layers.MaxPooling2D)
        and layer.activation is keras.activations.relu
        and layer.data_format == pooling.data_format == "channels_last"
    )


def _pooled_convolution(layer: keras.layers.Conv2D, pooling: keras.layers.MaxPooling2D) -> Compute:
    """Return the function of images [batch, H, W, C] that applies `layer` and then `pooling`.

    Adding the bias and ReLU are monotonic, so they can follow the pooling, where 2 x 2 pooling has left a quarter of
    the values. This saves 6 % of the time of a training step of `conv`.
    """

    def compute(x: tf.Tensor) -> tf.Tensor:
        x = pooling(layer.convolution_op(x, tf.convert_to_tensor(layer.kernel)))
        return tf.nn.relu(tf.nn.bias_add(x, layer.bias) if layer.use_bias else x)

    return compute


def for_training(model: keras.Model, precision: str = "float32") -> SeededNetwork:
    """Return the function from a seed, int64 [2], to the network for training; to be called in a graph.

    The seed decides what layers such as Dropout draw. Raises UsageError if the network cannot be computed in
    `precision`.
    """
    reduced = in_bfloat16(model) if precision == "bfloat16" else None

    def network(seed: tf.Tensor) -> Network:
        seed_layers(model, seed)
        return reduced or fused(model)

    return network


def seed_layers(model: keras.Model, seed: tf.Tensor) -> None:
    """Set the seeds of layers such as Dropout, which change with every call, to functions of `seed`, int64 [2].

    So their random numbers depend on the step and the shard alone, and their state needs no saving.
    """
    saved = {id(weight) for weight in model.non_trainable_weights}
    states = [variable for variable in model.non_trainable_variables if id(variable) not in saved]
    for number, state in enumerate(states):
        # Below 2**31 - 1, the number for `second_noisy`, and above those of the shards.
        state.assign(tf.cast(tf.random.experimental.stateless_fold_in(seed, 2**30 + number), state.dtype))


def in_bfloat16(model: keras.Model) -> Network:
    """Return the function from noisy images to the outputs of `model`, whose layers compute in bfloat16.

    The last layer computes in float32. Weights and the gradients with respect to them are float32. Source: Kalamkar et
    al., A Study of BFLOAT16 for Deep Learning Training (2019), as in Keras's policy `mixed_bfloat16`.

    Raises UsageError if the model has other layers than Keras's, whose copies could compute something else, or losses
    of activities, which would be those of another call.
    """
    if found := foreign(model):
        names = listed(operation.name for operation in found)
        raise UsageError(f"--precision: bfloat16 takes networks that consist of keras.layers alone, not of {names}")
    # Keras has no public function for the layers within a layer, such as that of a wrapper.
    if any(getattr(layer, "activity_regularizer", None) is not None for layer in model._flatten_layers()):
        raise UsageError("--precision: networks with regularizers of activities take only float32")

    def converted(layer: keras.Layer) -> keras.Layer:
        config: dict[str, Any] = layer.get_config()
        if layer is not model.layers[-1]:
            config["dtype"] = "mixed_bfloat16"
        copy = type(layer).from_config(config)
        compute = replacement(copy)
        return copy if compute is None else keras.layers.Lambda(compute, name=copy.name, dtype=copy.dtype_policy)

    with keras.StatelessScope(initialize_variables=False):  # the values are those of `model`
        reduced = with_latents(keras.models.clone_model(model, clone_function=converted))

    def network(noisy: tf.Tensor) -> Outputs:
        outputs, changed = reduced.stateless_call(
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.non_trainable_variables],
            noisy,
            training=True,
        )
        for variable, value in zip(model.non_trainable_variables, changed, strict=True):
            variable.assign(value)
        return Outputs(**{name: tf.cast(output, tf.float32) for name, output in outputs.items()})

    return network
