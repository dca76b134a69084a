import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.errors import UsageError
from dae.models import networks

SHAPE = (28, 28, 1)


def test_conv_is_the_tutorials_network():
    model = networks.build(RunConfig(), SHAPE)
    rows = [(type(layer).__name__, *layer.output.shape[1:]) for layer in model.layers]
    assert rows == [
        ("InputLayer", 28, 28, 1),
        ("Conv2D", 28, 28, 16),
        ("MaxPooling2D", 14, 14, 16),
        ("Conv2D", 14, 14, 8),
        ("MaxPooling2D", 7, 7, 8),
        ("Conv2D", 7, 7, 8),
        ("MaxPooling2D", 4, 4, 8),
        ("Conv2D", 4, 4, 8),
        ("UpSampling2D", 8, 8, 8),
        ("Conv2D", 8, 8, 8),
        ("UpSampling2D", 16, 16, 8),
        ("Conv2D", 14, 14, 16),
        ("UpSampling2D", 28, 28, 16),
        ("Conv2D", 28, 28, 1),
    ]
    assert model.count_params() == 4_385
    assert model.get_layer("encoder").output.shape == (None, 4, 4, 8)
    convolutions = [layer for layer in model.layers if type(layer).__name__ == "Conv2D"]
    assert all(layer.kernel_size == (3, 3) for layer in convolutions)
    assert [layer.activation.__name__ for layer in convolutions] == ["relu"] * 6 + ["sigmoid"]


def test_initial_weights_are_decided_by_the_seed_and_differ_between_layers():
    first, again = (networks.build(RunConfig(seed=5), SHAPE).get_weights() for _ in range(2))
    other = networks.build(RunConfig(seed=6), SHAPE).get_weights()
    for weights, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(weights, same)
    kernels = [index for index, weights in enumerate(first) if weights.ndim == 4]
    assert all(not np.array_equal(first[index], other[index]) for index in kernels)
    alike = [first[index] for index in kernels if first[index].shape == (3, 3, 8, 8)]
    assert len(alike) == 3
    assert not np.array_equal(alike[0], alike[1])


@settings(max_examples=30)
@given(st.integers(11, 80), st.integers(11, 80), st.sampled_from([1, 3]))
def test_images_of_any_sides_come_back_as_they_went_in(height, width, channels):
    model = networks.build(RunConfig(), (height, width, channels))
    assert model.output_shape == (None, height, width, channels)
    padding = model.get_layer("decoder_conv_3").padding
    assert padding == ("valid" if height % 8 == width % 8 == 4 else "same")
    assert ("cropped" in [layer.name for layer in model.layers]) == (
        padding == "same" and bool(height % 8 or width % 8)
    )


def test_what_comes_back_lies_where_it_was():
    """Weights that hand the first channel through: the encoder's pooling and the decoder's doubling, in place."""
    model = networks.build(RunConfig(), (21, 30, 1))
    for layer in model.layers:
        if layer.weights:
            kernel = np.zeros(layer.kernel.shape, np.float32)
            kernel[1, 1, 0, 0] = 1
            layer.set_weights([kernel, np.zeros(layer.bias.shape)])
    image = np.zeros((1, 21, 30, 1), np.float32)
    image[0, 16:, 24:] = 1
    shown = model(image).numpy()[0, :, :, 0]
    np.testing.assert_array_equal(shown > 0.6, image[0, :, :, 0] == 1)


def test_an_unknown_model_is_refused():
    with pytest.raises(UsageError, match="--model: unknown name 'convv'; did you mean 'conv'"):
        networks.build(RunConfig(model="convv"), SHAPE)
