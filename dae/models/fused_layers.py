"""Fused and reordered forms of layers, which compute the same function of the same weights faster on a CPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dae.models.sizes import enlargement, fitting_size, interpolates, mirrored, view_of_any_size

# The name of the layer whose output is the latents.
ENCODER = "encoder"

# A network of these layers is computed layer by layer, with FUSIONS and REORDERED; any other one is called as it is.
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
    """What a model computes from noisy images."""

    denoised: tf.Tensor
    latents: tf.Tensor | None
    """The output of the layer `encoder`, or None if there is no such layer."""


Network = Callable[[tf.Tensor], Outputs]


def fused(model: keras.Model, training: bool = True) -> Network:
    """Return the function from noisy images to the outputs of `model`, with its layers fused where that is faster.

    The function uses the weights that `model` has when `fused` is called. A `tf.function` must therefore call `fused`
    in its body; one call suffices for all shards. Outputs agree with those of `model` to 1e-5. A model with other
    layers than plain ones, or that runs on a GPU, is called unchanged.

    Images can have another size than those that `model` was built for, if its layers allow it: they are mirrored at the
    bottom and right up to a size that fits, and the denoised images are cropped. If the graph does not know their size,
    it must fit.
    """
    is_plain = not tf.config.get_visible_devices("GPU") and _is_plain(model)
    network = _layer_by_layer(model, training) if is_plain else _unchanged(model, training)

    def padded(noisy: tf.Tensor) -> Outputs:
        height, width = noisy.shape[1:3]
        if None in (height, width):
            return network(noisy)
        padded_height, padded_width = fitting_size(model, height, width)
        if (padded_height, padded_width) == (height, width):
            return network(noisy)
        # Not tf.pad, which mirrors an image only once.
        rows, columns = mirrored(height, padded_height), mirrored(width, padded_width)
        outputs = network(tf.gather(tf.gather(noisy, rows, axis=1), columns, axis=2))
        return outputs._replace(denoised=outputs.denoised[:, :height, :width])

    return padded


def _unchanged(model: keras.Model, training: bool) -> Network:
    encoder = next((layer for layer in model.layers if layer.name == ENCODER), None)
    both = view_of_any_size(
        keras.Model(model.inputs[0], [model.outputs[0], encoder.output if encoder else model.outputs[0]])
    )

    def network(noisy: tf.Tensor) -> Outputs:
        denoised, latents = both(noisy, training=training)
        return Outputs(denoised, latents if encoder else None)

    return network


def _layer_by_layer(model: keras.Model, training: bool) -> Network:
    layers = _without_input(model)
    compute: dict[str, Compute] = {layer.name: _computation(layer, training) for layer in layers}
    done: set[str] = set()
    for before, layer in _pairs(model):
        fuse = next((fuse for fits, fuse in FUSIONS if fits(before, layer)), None)
        if fuse is not None and before.name not in done:  # a convolution can follow upsampling and precede pooling
            compute[before.name], compute[layer.name] = tf.identity, fuse(before, layer)
            done.add(layer.name)

    def network(noisy: tf.Tensor) -> Outputs:
        values, latents = {id(model.inputs[0]): noisy}, None
        for layer in layers:
            inputs = keras.tree.map_structure(lambda tensor: values[id(tensor)], layer.input)
            values[id(layer.output)] = compute[layer.name](inputs)
            latents = values[id(layer.output)] if layer.name == ENCODER else latents
        return Outputs(values[id(model.outputs[0])], latents)

    return network


def _computation(layer: keras.layers.Layer, training: bool) -> Compute:
    reorder = next((reorder for fits, reorder in REORDERED if fits(layer)), None)
    if reorder is not None:
        return reorder(layer)
    return lambda inputs: layer(inputs, training=training)


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
    if len(model.inputs) != 1 or len(model.outputs) != 1:
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


def _upsampled_convolution(before: keras.layers.UpSampling2D, layer: keras.layers.Conv2D) -> Compute:
    """Return the function of images [batch, H, W, C] that applies `before` and then `layer`.

    The upsampled image repeats pixels, so each output pixel depends on only 2 x 2 pixels of the small image, and the
    3 x 3 weights can be added up to 2 x 2 weights. Which are added depends on whether the output pixel's row and column
    are even or odd. One convolution of the small image computes the four cases as channels, and the upsampled
    image and its gradient are never computed. This saves a third of the time of a training step of `conv`, mostly in
    the last layer.
    """
    kernel = tf.convert_to_tensor(layer.kernel)
    pad = 1 if layer.padding == "same" else 0
    # `rows` maps each row of the kernel to the row of the small image that it multiplies, for even and odd output rows.
    parity, tap = np.indices((2, 3))
    rows = np.zeros((2, 2 + pad, 3), np.float32)
    rows[parity, (parity + tap - pad) // 2 + pad, tap] = 1
    small_kernel = _kernel_of_positions(kernel, rows, rows)
    bias = tf.tile(tf.convert_to_tensor(layer.bias), [4]) if layer.use_bias else None

    def compute(x: tf.Tensor) -> tf.Tensor:
        four = tf.nn.conv2d(x, small_kernel, strides=1, padding=layer.padding.upper())
        return layer.activation(_pixels_from_channels(four if bias is None else tf.nn.bias_add(four, bias), 2))

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
    the small image, with every s-th row and column of the kernel. One convolution computes them all as channels.
    """
    (stride, _), kernel = layer.strides, tf.convert_to_tensor(layer.kernel)

    def taps(size: int) -> tuple[np.ndarray, int]:
        """Return which row of the kernel each output position multiplies, and the offset of the first input row."""
        before = (size - stride) // 2
        first, last = -((size - 1 - before) // stride), (stride - 1 + before) // stride
        position, offset, row = np.indices((stride, last - first + 1, size))
        return (row == position + before - stride * (offset + first)).astype(np.float32), first

    (rows, first_row), (columns, first_column) = map(taps, layer.kernel_size)
    small_kernel = _kernel_of_positions(tf.transpose(kernel, [0, 1, 3, 2]), rows, columns)
    height, width = rows.shape[1], columns.shape[1]
    padding: Any = [[0, 0], [-first_row, height - 1 + first_row], [-first_column, width - 1 + first_column], [0, 0]]
    if (-first_row, -first_column) == ((height - 1) // 2, (width - 1) // 2):
        padding = "SAME"  # the same numbers, but only so does oneDNN compute the gradients
    bias = tf.tile(tf.convert_to_tensor(layer.bias), [stride**2]) if layer.use_bias else None

    def compute(x: tf.Tensor) -> tf.Tensor:
        all_positions = tf.nn.conv2d(x, small_kernel, strides=1, padding=padding)
        all_positions = all_positions if bias is None else tf.nn.bias_add(all_positions, bias)
        return layer.activation(_pixels_from_channels(all_positions, stride))

    return compute


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


# Each entry holds a test of a pair of layers, and the function that fuses a pair for which the test is true.
FUSIONS: tuple[tuple[Callable[..., bool], Callable[..., Compute]], ...] = (
    (_upsamples, _upsampled_convolution),
    (_pools, _pooled_convolution),
)
# The same for single layers.
REORDERED: tuple[tuple[Callable[..., bool], Callable[..., Compute]], ...] = (
    (_transposes, _transposed_convolution),
    (interpolates, enlargement),
)
