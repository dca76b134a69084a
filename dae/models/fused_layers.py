"""Networks as they are computed: by fused layers, which are faster on a CPU, with seeds, and in a run's precision."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dae.errors import UsageError, listed
from dae.models.sizes import Function, fitting_size, foreign, view_with

# The name of the layer whose output is the latents.
ENCODER = "encoder"


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


@tf.autograph.experimental.do_not_convert
def fused(model: keras.Model, training: bool = True) -> Network:
    """Return the function from noisy images to the outputs of `model`, with its layers fused where that is faster.

    Outputs agree with those of `model` to 1e-5. On a GPU, no layers are fused. In inference, layers that draw random
    numbers, such as that of a variational autoencoder, draw the same ones for every batch.

    Images can have another size than those that `model` was built for, if its layers allow it: they are mirrored at the
    bottom and right up to a size that fits, and the denoised images are cropped. If the graph does not know their size,
    it must fit.
    """
    view = _view(model, not tf.config.get_visible_devices("GPU"))

    def network(noisy: tf.Tensor) -> Outputs:
        return Outputs(**view(noisy, training=training))

    @tf.autograph.experimental.do_not_convert
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


def with_latents(model: keras.Model) -> keras.Model:
    """Return a model of the same layers whose outputs are a dictionary with the fields of `Outputs`."""
    latents = [("latents", layer.output) for layer in model.layers if layer.name == ENCODER]
    return keras.Model(model.inputs[0], dict([("denoised", model.outputs[0]), *latents]))


@functools.lru_cache(maxsize=16)
def _view(model: keras.Model, is_fused: bool) -> keras.Model:
    """Return `with_latents(model)` for images of any size, with the very layers of `model`, or functions of these."""
    named = with_latents(model)
    return view_with(named, _fusions(named) if is_fused else {})


def _fusions(model: keras.Model) -> dict[str, Function]:
    """Return the functions that compute fused layers of `model`, by the names of the layers.

    Of two layers, the first becomes the identity, so nothing else may use its output.
    """
    producers = {id(operation.output): operation for operation in model.operations}
    users: dict[int, list[Any]] = {id(output): [model] for output in model.outputs}
    for operation in model.operations:
        for tensor in keras.tree.flatten(operation.input):
            users.setdefault(id(tensor), []).append(operation)
    # An operation has only its first output here, so the second one of a layer that is used twice is not among these.
    if not {*users} <= {*producers}:
        return {}
    functions: dict[str, Function] = {}
    for tensor, (user, *others) in users.items():
        before = producers[tensor]
        if others or before.name in functions:  # a convolution can follow upsampling and precede pooling
            continue
        if _upsamples(before, user):
            functions |= {before.name: tf.identity, user.name: functools.partial(_upsampled_convolution, user)}
        elif _pools(before, user):
            functions |= {before.name: tf.identity, user.name: functools.partial(_pooled_convolution, before, user)}
    return functions


def _is(layer: Any, kind: type[keras.Layer]) -> bool:
    """Return whether a layer is of just this kind, in float32, and does nothing else, so that it can be fused."""
    is_plain = type(layer) is kind and layer.activity_regularizer is None and layer.dtype_policy.name == "float32"
    return is_plain and layer.data_format == "channels_last"


def _upsamples(before: Any, layer: Any) -> bool:
    """Return whether `before` repeats each pixel 2 x 2 times and `layer` is a plain 3 x 3 convolution."""
    return (
        _is(before, keras.layers.UpSampling2D)
        and _is(layer, keras.layers.Conv2D)
        and (before.size, before.interpolation) == ((2, 2), "nearest")
        and (layer.kernel_size, layer.strides, layer.dilation_rate, layer.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and layer.padding in ("same", "valid")
    )


def _upsampled_convolution(layer: keras.layers.Conv2D, x: tf.Tensor) -> tf.Tensor:
    """Repeat each pixel of images [batch, H, W, C] 2 x 2 times, and then apply `layer`.

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
    # This is einsum("auh,bvw,hwio->uviabo") with the kernel, as one product, because it is computed for each shard.
    size, (inputs, outputs) = 2 + pad, layer.kernel.shape[2:]
    matrix = np.einsum("auh,bvw->uvabhw", rows, rows).reshape(-1, 9)
    product = tf.matmul(matrix, tf.reshape(tf.convert_to_tensor(layer.kernel), [9, inputs * outputs]))
    cases = tf.transpose(tf.reshape(product, [size, size, 4, inputs, outputs]), [0, 1, 3, 2, 4])
    kernel = tf.reshape(cases, [size, size, inputs, 4 * outputs])
    x = tf.nn.conv2d(x, kernel, strides=1, padding=layer.padding.upper())
    if layer.use_bias:
        x = tf.nn.bias_add(x, tf.tile(tf.convert_to_tensor(layer.bias), [4]))
    return layer.activation(_pixels_from_channels(x))


def _pixels_from_channels(x: tf.Tensor) -> tf.Tensor:
    """Return the same as `tf.nn.depth_to_space(x, 2)`, from [batch, H, W, 4 C] to [batch, 2 H, 2 W, C].

    TensorFlow's operation is slow for C = 1, and its gradient is even slower; this implementation saves 5 % of the time
    of a training step of `conv`.
    """
    _, height, width, channels = keras.ops.shape(x)  # numbers if the graph knows the shape
    x = tf.reshape(x, [-1, height, width, 2, 2, channels // 4])
    return tf.reshape(tf.transpose(x, [0, 1, 3, 2, 4, 5]), [-1, 2 * height, 2 * width, channels // 4])


def _pools(layer: Any, pooling: Any) -> bool:
    """Return whether `layer` is a convolution with ReLU and `pooling` takes the maximum of its output."""
    return (
        _is(layer, keras.layers.Conv2D)
        and _is(pooling, keras.layers.MaxPooling2D)
        and layer.activation is keras.activations.relu
    )


def _pooled_convolution(layer: keras.layers.Conv2D, pooling: keras.layers.MaxPooling2D, x: tf.Tensor) -> tf.Tensor:
    """Apply `layer` and then `pooling` to images [batch, H, W, C].

    Adding the bias and ReLU are monotonic, so they can follow the pooling, where 2 x 2 pooling has left a quarter of
    the values. This saves 6 % of the time of a training step of `conv`.
    """
    x = pooling(layer.convolution_op(x, tf.convert_to_tensor(layer.kernel)))
    return tf.nn.relu(tf.nn.bias_add(x, layer.bias) if layer.use_bias else x)


def for_training(model: keras.Model, precision: str = "float32") -> SeededNetwork:
    """Return the function from a seed, int64 [2], to the network for training; to be called in a graph.

    The seed decides what layers such as Dropout draw. Raises UsageError if the network cannot be computed in
    `precision`.
    """
    reduced = in_bfloat16(model) if precision == "bfloat16" else None

    @tf.autograph.experimental.do_not_convert
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

    Raises UsageError if the model has other layers than Keras's, which may not take bfloat16, or losses of activities,
    which would be in bfloat16 too.
    """
    if found := foreign(model):
        names = listed(operation.name for operation in found)
        raise UsageError(f"--precision: bfloat16 takes networks that consist of keras.layers alone, not of {names}")
    # Keras has no public function for the layers within a layer, such as that of a wrapper.
    if any(getattr(layer, "activity_regularizer", None) is not None for layer in model._flatten_layers()):
        raise UsageError("--precision: networks with regularizers of activities take only float32")
    view, last = _view(model, is_fused=False), {layer.name for layer in model.layers[-1]._flatten_layers()}
    layers = [layer for network in (model, view) for layer in network._flatten_layers(include_self=False)]
    reduced = [layer for layer in layers if layer.name not in last]

    @tf.autograph.experimental.do_not_convert
    def network(noisy: tf.Tensor) -> Outputs:
        policies = [layer.dtype_policy for layer in reduced]
        try:
            for layer in reduced:
                layer.dtype_policy = "mixed_bfloat16"
            outputs = view(noisy, training=True)
        finally:
            for layer, policy in zip(reduced, policies, strict=True):
                layer.dtype_policy = policy
        return Outputs(**{name: tf.cast(output, tf.float32) for name, output in outputs.items()})

    return network
