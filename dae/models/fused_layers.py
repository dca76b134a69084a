"""Fused forms of pairs of layers, which compute the same function of the same weights faster on a CPU."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

# The name of the layer whose output is the latents.
ENCODER = "encoder"

# These layers compute the same in training and inference, so that calling them in order is the same as calling the
# model.
_PLAIN = (keras.layers.Conv2D, keras.layers.MaxPooling2D, keras.layers.UpSampling2D, keras.layers.Cropping2D)

Compute = Callable[[tf.Tensor], tf.Tensor]


class Outputs(NamedTuple):
    """What a model computes from noisy images."""

    denoised: tf.Tensor
    latents: tf.Tensor | None
    """The output of the layer `encoder`, or None if there is no such layer."""


Network = Callable[[tf.Tensor], Outputs]


def fused(model: keras.Model, training: bool = True) -> Network:
    """Return the function from noisy images to the outputs of `model`, with pairs of layers in FUSIONS fused.

    The function uses the weights that `model` has when `fused` is called. A `tf.function` must therefore call `fused`
    in its body; one call suffices for all shards. Outputs agree with those of `model` to 1e-6. A model that is not a
    chain of plain layers, or that runs on a GPU, is called unchanged.
    """
    if tf.config.list_physical_devices("GPU") or not _is_plain_chain(model):
        encoder = next((layer for layer in model.layers if layer.name == ENCODER), None)
        both = keras.Model(model.inputs, [model.outputs[0], encoder.output if encoder else model.outputs[0]])

        def unchanged(noisy: tf.Tensor) -> Outputs:
            denoised, latents = both(noisy, training=training)
            return Outputs(denoised, latents if encoder else None)

        return unchanged
    return _chain(model)


def _chain(model: keras.Model) -> Network:
    names, steps, layers = [], [], _without_input(model)
    while layers:
        pair = layers[:2]
        fuse = next((fuse for fits, fuse in FUSIONS if len(pair) == 2 and fits(*pair)), None)
        count = 2 if fuse else 1
        names.append(layers[count - 1].name)
        steps.append(fuse(*pair) if fuse else pair[0])
        del layers[:count]

    def network(noisy: tf.Tensor) -> Outputs:
        x, latents = noisy, None
        for name, step in zip(names, steps, strict=True):
            x = step(x)
            latents = x if name == ENCODER else latents
        return Outputs(x, latents)

    return network


def _without_input(model: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


def _is_plain_chain(model: keras.Model) -> bool:
    layers = _without_input(model)
    if not layers or not all(type(layer) in _PLAIN for layer in layers):
        return False
    tensors = [(layer.input, layer.output) for layer in layers]
    return (
        [id(tensor) for tensor in model.inputs] == [id(tensors[0][0])]
        and [id(tensor) for tensor in model.outputs] == [id(tensors[-1][1])]
        and all(after[0] is before[1] for before, after in itertools.pairwise(tensors))
    )


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
    small_kernel = tf.einsum("auh,bvw,hwio->uviabo", rows, rows, kernel)
    small_kernel = tf.reshape(small_kernel, [2 + pad, 2 + pad, kernel.shape[2], 4 * kernel.shape[3]])
    bias = tf.tile(tf.convert_to_tensor(layer.bias), [4]) if layer.use_bias else None

    def compute(x: tf.Tensor) -> tf.Tensor:
        four = tf.nn.conv2d(x, small_kernel, strides=1, padding=layer.padding.upper())
        return layer.activation(_pixels_from_channels(four if bias is None else tf.nn.bias_add(four, bias)))

    return compute


def _pixels_from_channels(x: tf.Tensor) -> tf.Tensor:
    """Return the same as `tf.nn.depth_to_space(x, 2)`, from [batch, H, W, 4 C] to [batch, 2 H, 2 W, C].

    TensorFlow's operation is slow for C = 1, and its gradient is even slower; this implementation saves 5 % of the time
    of a training step of `conv`.
    """
    _, height, width, channels = keras.ops.shape(x)  # numbers if the graph knows the shape
    x = tf.reshape(x, [-1, height, width, 2, 2, channels // 4])
    return tf.reshape(tf.transpose(x, [0, 1, 3, 2, 4, 5]), [-1, 2 * height, 2 * width, channels // 4])


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
