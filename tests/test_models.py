import numpy as np
import pytest

from dae import models
from dae.config import RunConfig
from dae.errors import UsageError

SHAPE = (28, 28, 1)


def test_conv_is_the_tutorials_network():
    model = models.build(RunConfig(), SHAPE)
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
    first, again = (models.build(RunConfig(seed=5), SHAPE).get_weights() for _ in range(2))
    other = models.build(RunConfig(seed=6), SHAPE).get_weights()
    for weights, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(weights, same)
    kernels = [index for index, weights in enumerate(first) if weights.ndim == 4]
    assert all(not np.array_equal(first[index], other[index]) for index in kernels)
    alike = [first[index] for index in kernels if first[index].shape == (3, 3, 8, 8)]
    assert len(alike) == 3
    assert not np.array_equal(alike[0], alike[1])


@pytest.mark.parametrize("shape", [(32, 32, 1), (27, 28, 1), (64, 64, 3)])
def test_images_that_would_not_come_back_as_they_went_in_are_refused(shape):
    with pytest.raises(UsageError, match=r"--model conv: images of .* would come back as .* sides of 12, 20, 28"):
        models.build(RunConfig(), shape)


@pytest.mark.parametrize("shape", [(12, 20, 1), (36, 28, 3)])
def test_images_with_sides_of_4_more_than_a_multiple_of_8_fit(shape):
    assert models.build(RunConfig(), shape).output_shape == (None, *shape)


def test_an_unknown_model_is_refused():
    with pytest.raises(UsageError, match="--model: unknown name 'convv'; did you mean 'conv'"):
        models.build(RunConfig(model="convv"), SHAPE)
