"""The receptive field of a network, computed from its layers: on which pixels an output pixel depends.

Source: Araujo, Norris and Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill (2019). Offsets are
intervals here, because with 'same' padding they differ between even and odd sizes, and fractions, because upsampled
pixels lie between those of the image.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import keras
from keras import layers


class ReceptiveField(NamedTuple):
    """Pixels that an output pixel can depend on, as (rows, columns)."""

    before: tuple[int, int]
    """How far above and left of it they reach."""
    after: tuple[int, int]
    """How far below and right of it they reach."""
    period: tuple[int, int]
    """The image shifted by a multiple of this gives the output shifted by the same, away from the borders."""


class _Axis(NamedTuple):
    """On what the pixels of a tensor depend along one axis: pixel i on [scale i + low, scale i + high] of the input.

    low <= 0, and high >= end, so that a pixel outside the tensor, where a layer sees padding, is one that depends on
    what is outside the image.
    """

    scale: Fraction = Fraction(1)
    """Pixels of the input per pixel."""
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)
    end: Fraction = Fraction(0)
    """An upper bound of (pixels of the input) - scale (pixels of the tensor)."""
    period: int = 1


_Step = Callable[[_Axis], _Axis]


def receptive_field(model: keras.Model) -> ReceptiveField | None:
    """Return the receptive field of a model from images [batch, H, W, C] to images of the same size.

    It is never too small, but can be too large by a few pixels. Returns None if there is no finite one, as with dense
    layers on all pixels, global pooling or attention, or if a layer is not known here.
    """
    axes = _through(model, (_Axis(), _Axis()))
    if axes is None or any(axis.scale != 1 for axis in axes):
        return None
    rows, columns = axes
    return ReceptiveField(
        (math.floor(-rows.low), math.floor(-columns.low)),
        (math.floor(rows.high), math.floor(columns.high)),
        (rows.period, columns.period),
    )


def _through(model: keras.Model, start: tuple[_Axis, _Axis]) -> tuple[_Axis, _Axis] | None:
    """Return the axes of the model's output for those of its input, or None."""
    if getattr(model, "inputs", None) is None or len(model.inputs) != 1 or len(model.outputs) != 1:
        return None
    known = {id(model.inputs[0]): start}
    for layer in model.layers:
        if isinstance(layer, layers.InputLayer):
            continue
        # The inputs of an operation that is no layer, or of the second use of one, are not known.
        inputs = [known.get(id(tensor)) for tensor in keras.tree.flatten(layer.input)]
        axes = _merged(layer, [axes for axes in inputs if axes is not None]) if all(inputs) else None
        if axes is not None and isinstance(layer, keras.Model):
            axes = _through(layer, axes)
        elif axes is not None:
            axes = _after(layer, axes)
        if axes is not None:
            known[id(layer.output)] = axes
    return known.get(id(model.outputs[0]))


def _merged(layer: keras.layers.Layer, inputs: list[tuple[_Axis, _Axis]]) -> tuple[_Axis, _Axis] | None:
    """Return the axes on which all inputs of a layer together depend, or None if they cannot be combined."""
    if len(inputs) > 1 and (type(layer) not in _MERGES or getattr(layer, "axis", -1) not in (-1, 3)):
        return None
    rows, columns = (_union(axes) for axes in zip(*inputs, strict=True))
    return None if rows is None or columns is None else (rows, columns)


def _union(axes: tuple[_Axis, ...]) -> _Axis | None:
    if len({axis.scale for axis in axes}) > 1:
        return None
    return _Axis(
        axes[0].scale,
        min(axis.low for axis in axes),
        max(axis.high for axis in axes),
        max(axis.end for axis in axes),
        math.lcm(*(axis.period for axis in axes)),
    )


def _after(layer: keras.layers.Layer, axes: tuple[_Axis, _Axis]) -> tuple[_Axis, _Axis] | None:
    """Return the axes of a layer's output, or None if it is not known here."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    if type(layer) in _ONE_PIXEL or type(layer) in _MERGES:
        return axes
    if type(layer) in _ALONG_CHANNELS:
        channels = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        return axes if all(axis in (-1, 3) for axis in channels) else None
    if type(layer) is layers.PReLU:
        return axes if {1, 2} <= {*(layer.shared_axes or ())} else None
    make = _STEPS.get(type(layer))
    steps = make(layer) if make else None
    if steps is None:
        return None
    rows, columns = (_with_period(step(axis)) for step, axis in zip(steps, axes, strict=True))
    return rows, columns


def _with_period(axis: _Axis) -> _Axis:
    # A shift of the input by this many pixels is one of the tensor by a whole number.
    return axis._replace(period=math.lcm(axis.period, axis.scale.numerator))


def _window(size: int, stride: int, padding: str) -> _Step:
    """Return the step of a convolution or pooling with a window of `size` pixels."""
    if padding == "same":
        # The padding in total is `size - stride` if the stride divides the length, and else up to `size - 1`.
        least, most = max(size - stride, 0) // 2, (size - 1) // 2 if stride > 1 else max(size - stride, 0) // 2
    else:
        least = most = 0

    def step(axis: _Axis) -> _Axis:
        scale, low, high, end, period = axis
        lost = 0 if padding == "same" else size - 1
        return _Axis(
            scale * stride,
            low - scale * max(least, most),
            high + scale * (size - 1 - least),
            end + scale * lost,
            period,
        )

    return step


def _transposed_window(size: int, stride: int, padding: str, is_plain: bool) -> _Step:
    """Return the step of a transposed convolution with a window of `size` pixels."""
    if is_plain:
        least = most = max(size - stride, 0) // 2 if padding == "same" else 0
    else:  # with output padding or dilation; whatever is padded
        least, most = 0, size - 1

    def step(axis: _Axis) -> _Axis:
        scale, low, high, end, period = axis
        small = scale / stride
        lost = 0 if is_plain else small * (size + stride)
        return _Axis(small, low + small * (least - size + 1), max(high + small * most, end + lost), end + lost, period)

    return step


def _upsampling(factor: int, interpolation: str) -> _Step:
    def step(axis: _Axis) -> _Axis:
        scale, low, high, end, period = axis
        small = scale / factor
        if interpolation == "nearest":
            return _Axis(small, low - small * (factor - 1), high, end, period)
        # Bilinear: the coordinate is (i + 1/2) / factor - 1/2, and the pixels are those around it.
        centre = (Fraction(1, factor) - 1) / 2
        return _Axis(small, low + scale * (centre - 1), high + scale * (centre + 1), end, period)

    return step


def _shift(before: int, after: int) -> _Step:
    """Return the step of padding by this many pixels, or cropping if they are negative."""

    def step(axis: _Axis) -> _Axis:
        scale, low, high, end, period = axis
        end -= scale * (before + after)
        return _Axis(scale, min(low - scale * before, Fraction(0)), max(high - scale * before, end), end, period)

    return step


def _windows(layer: Any) -> tuple[_Step, ...]:
    sizes = layer.pool_size if hasattr(layer, "pool_size") else layer.kernel_size
    dilations = getattr(layer, "dilation_rate", (1, 1))
    return tuple(
        _window((size - 1) * dilation + 1, stride, layer.padding)
        for size, dilation, stride in zip(sizes, dilations, layer.strides, strict=True)
    )


def _transposed_windows(layer: Any) -> tuple[_Step, ...]:
    is_plain = layer.output_padding is None and layer.dilation_rate == (1, 1)
    return tuple(
        _transposed_window((size - 1) * dilation + 1, stride, layer.padding, is_plain)
        for size, dilation, stride in zip(layer.kernel_size, layer.dilation_rate, layer.strides, strict=True)
    )


def _upsamplings(layer: Any) -> tuple[_Step, ...] | None:
    if layer.interpolation not in ("nearest", "bilinear"):
        return None
    return tuple(_upsampling(factor, layer.interpolation) for factor in layer.size)


_STEPS: dict[type, Callable[[Any], tuple[_Step, ...] | None]] = {
    layers.Conv2D: _windows,
    layers.DepthwiseConv2D: _windows,
    layers.SeparableConv2D: _windows,
    layers.MaxPooling2D: _windows,
    layers.AveragePooling2D: _windows,
    layers.Conv2DTranspose: _transposed_windows,
    layers.UpSampling2D: _upsamplings,
    layers.ZeroPadding2D: lambda layer: tuple(_shift(*sides) for sides in layer.padding),
    layers.Cropping2D: lambda layer: tuple(_shift(-before, -after) for before, after in layer.cropping),
}

# Layers whose output pixel depends on the one input pixel at the same place.
_ONE_PIXEL = (
    layers.Activation,
    layers.ActivityRegularization,
    layers.AlphaDropout,
    layers.Dense,
    layers.Dropout,
    layers.ELU,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.LeakyReLU,
    layers.ReLU,
    layers.Rescaling,
    layers.SpatialDropout2D,
)
# The same if their axis is that of the channels.
_ALONG_CHANNELS = (layers.BatchNormalization, layers.LayerNormalization, layers.Softmax, layers.UnitNormalization)
# The same for several inputs.
_MERGES = (
    layers.Add,
    layers.Average,
    layers.Concatenate,
    layers.Maximum,
    layers.Minimum,
    layers.Multiply,
    layers.Subtract,
)
