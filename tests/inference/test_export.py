"""Exported files, opened as their users open them: by their own runtime, without this package's functions."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.errors import RunError, UsageError
from dae.inference import export
from dae.models import networks, sizes

Denoise = Callable[[np.ndarray], np.ndarray]
OUTPUTS = {"onnx": "model.onnx", "litert": "model.tflite", "savedmodel": "model"}


@pytest.fixture(params=OUTPUTS)
def format_name(request: pytest.FixtureRequest) -> str:
    require_extra(request.param)
    return request.param


def require_extra(format_name: str) -> None:
    for module in export.FORMATS[format_name].modules:
        pytest.importorskip(module, reason="needs the extra `export`")


def open_onnx(path: Path) -> Denoise:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (noisy,), (denoised,) = session.get_inputs(), session.get_outputs()
    assert (noisy.name, noisy.type) == ("noisy", "tensor(float)")
    assert (denoised.name, denoised.type) == ("denoised", "tensor(float)")
    assert noisy.shape == denoised.shape
    return lambda images: session.run(None, {"noisy": images})[0]


def open_litert(path: Path) -> Denoise:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["noisy"], "outputs": ["denoised"]}}
    (noisy,), (denoised,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (noisy["dtype"], denoised["dtype"]) == (np.float32, np.float32)

    def denoise(images: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(noisy["index"], images.shape, strict=True)  # only sizes that are free
        interpreter.allocate_tensors()
        interpreter.set_tensor(noisy["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(denoised["index"])

    return denoise


def open_savedmodel(path: Path) -> Denoise:
    loaded = tf.saved_model.load(str(path))
    assert list(loaded.signatures["serving_default"].structured_outputs) == ["denoised"]
    assert "noisy" in loaded.signatures["serving_default"].structured_input_signature[1]
    return lambda images: loaded.serve(images)["denoised"].numpy()


OPEN = {"onnx": open_onnx, "litert": open_litert, "savedmodel": open_savedmodel}


def noisy_digits(mnist, batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """Return noisy test digits, on black where they are smaller than the image."""
    digits = mnist.test.pixels[: batch * channels, :height, :width, 0]
    clean = np.zeros((batch, channels, height, width))
    clean[:, :, :28, :28] = digits.reshape(batch, channels, *digits.shape[1:]) / 255
    noisy = clean + np.random.default_rng(0).normal(0, 0.5, clean.shape)
    return np.clip(noisy, 0, 1).astype(np.float32).transpose(0, 2, 3, 1)


def trained_for_a_moment(model: keras.Model, noisy: np.ndarray) -> keras.Model:
    """Return the model with moving means and variances of batch normalization that differ from the initial ones."""
    for _ in range(3):
        model(noisy, training=True)
    return model


def layers_of_all_kinds(image_shape: tuple[int, int, int]) -> keras.Model:
    """A user's network: with batch normalization, dropout, a nested model, attention, and a layer used twice."""
    layers = keras.layers
    channels = image_shape[-1]
    noisy = keras.Input(image_shape)
    twice = layers.SeparableConv2D(8, 3, padding="same")
    small = layers.Conv2D(8, 3, strides=2, padding="same")(noisy)
    small = layers.PReLU(shared_axes=[1, 2])(layers.BatchNormalization()(twice(twice(small))))
    small = layers.SpatialDropout2D(0.5)(layers.Dropout(0.5)(small))
    weight = layers.Dense(8, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(small))
    nested = keras.Sequential(
        [keras.Input((None, None, 8)), layers.UpSampling2D(2), layers.Conv2D(8, 3, padding="same")]
    )
    smooth = layers.UpSampling2D(2, interpolation="bilinear")(small)
    x = layers.Concatenate()([nested(layers.Multiply()([small, weight])), smooth])
    return keras.Model(noisy, layers.Conv2D(channels, 3, padding="same", activation="sigmoid")(x))


NETWORKS = {**networks.MODELS, "user": layers_of_all_kinds}


@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", NETWORKS)
def test_exported_network_denoises_the_same_in_other_sizes_and_batches(network, channels, format_name, mnist, tmp_path):
    model = sizes.any_size(NETWORKS[network]((28, 28, channels)))
    trained_for_a_moment(model, noisy_digits(mnist, 4, 28, 28, channels))
    exported = export.export(model, format_name, tmp_path / OUTPUTS[format_name])
    assert exported.largest_difference < export.TOLERANCE
    assert len(exported.shapes) == 4
    denoise = OPEN[format_name](tmp_path / OUTPUTS[format_name])
    for shape in [(1, 28, 28), (4, 28, 28), (1, 36, 44), (2, 36, 44)]:
        noisy = noisy_digits(mnist, *shape, channels)
        np.testing.assert_allclose(denoise(noisy), model(noisy, training=False), rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [OUTPUTS[format_name]]


def test_network_that_pads_and_crops_is_checked_on_sizes_that_it_takes(format_name, mnist, tmp_path):
    model = sizes.any_size(networks.build(RunConfig(), (30, 27, 1)))  # takes 30 + 8 n and 27 + 8 n
    exported = export.export(model, format_name, tmp_path / OUTPUTS[format_name])
    assert exported.shapes == [(1, 30, 35, 1), (3, 30, 35, 1), (1, 38, 51, 1), (3, 38, 51, 1)]
    denoise, noisy = OPEN[format_name](tmp_path / OUTPUTS[format_name]), noisy_digits(mnist, 2, 46, 35, 1)
    np.testing.assert_allclose(denoise(noisy), model(noisy), rtol=0, atol=1e-5)


def test_network_of_one_size_stays_so(format_name, mnist, tmp_path):
    layers = keras.layers
    flat = [layers.Flatten(), layers.Dense(9, activation="relu"), layers.Dense(784), layers.Reshape((28, 28, 1))]
    model = sizes.any_size(keras.Sequential([keras.Input((28, 28, 1)), *flat]))
    exported = export.export(model, format_name, tmp_path / OUTPUTS[format_name])
    assert exported.shapes == [(1, 28, 28, 1), (3, 28, 28, 1)]
    denoise, noisy = OPEN[format_name](tmp_path / OUTPUTS[format_name]), noisy_digits(mnist, 2, 28, 28, 1)
    np.testing.assert_allclose(denoise(noisy), model(noisy), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match=r"(?i)shape|dimension"):  # each runtime has its own error
        denoise(noisy_digits(mnist, 2, 36, 44, 1))


def test_network_of_free_size_with_a_nested_one_of_fixed_size_is_checked_in_the_one_size_that_it_takes():
    inner = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Conv2D(1, 3, padding="same")])
    model = sizes.any_size(keras.Sequential([keras.Input((28, 28, 1)), inner]))
    assert model.input_shape == (None, None, None, 1)
    assert export._shapes(model) == [(1, 28, 28, 1), (3, 28, 28, 1)]


def test_images_of_the_check_are_noisy_digits_in_all_channels(mnist):
    noisy = export._noisy_digits((2, 30, 57, 3))
    assert (noisy.shape, noisy.dtype, noisy.min(), noisy.max()) == ((2, 30, 57, 3), np.float32, 0, 1)
    for channel in range(3):
        clean = mnist.test.pixels[6 * channel, :, :, 0] / 255  # each channel has 2 rows of 3 digits
        assert np.corrcoef(noisy[0, :28, :28, channel].ravel(), clean.ravel())[0, 1] > 0.3


def test_file_with_other_weights_is_refused(format_name, tmp_path):
    first, second = (sizes.any_size(networks.build(RunConfig(seed=seed), (28, 28, 1))) for seed in (0, 1))
    path = tmp_path / OUTPUTS[format_name]
    export.export(first, format_name, path)
    export.verify(path, format_name, first)
    with pytest.raises(RunError, match=r"images \(1, 28, 28, 1\) differ by up to \d.*Keras model, more than 1e-05"):
        export.verify(path, format_name, second)


class AddsCalls(keras.layers.Layer):
    """A layer that computes something else at each call, of which a file keeps only one."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, images):
        self.calls += 1
        return images + self.calls

    def get_config(self):
        return {}


def test_export_that_differs_is_not_written(format_name, tmp_path):
    noisy = keras.Input((None, None, 1))
    model = keras.Model(noisy, AddsCalls()(keras.layers.Conv2D(1, 3, padding="same")(noisy)))
    path = tmp_path / OUTPUTS[format_name]
    with pytest.raises(RunError, match=f"{format_name}: images .* differ by up to"):
        export.export(model, format_name, path)
    assert list(tmp_path.iterdir()) == []


# What a converter cannot express, and how the user learns of it.
IMPOSSIBLE = [
    ("onnx", keras.layers.Activation("gelu"), "No Op registered for Erfc"),
    ("litert", keras.layers.UpSampling2D(2, interpolation="bicubic"), "TF Select ops: ResizeBicubic"),
]


@pytest.mark.parametrize(("format_name", "layer", "reason"), IMPOSSIBLE, ids=["onnx", "litert"])
def test_layer_that_a_format_lacks_is_named_in_one_line_and_the_old_file_kept(format_name, layer, reason, tmp_path):
    require_extra(format_name)
    noisy = keras.Input((None, None, 1))
    small = keras.layers.Conv2D(8, 3, strides=1 if format_name == "onnx" else 2, padding="same")(noisy)
    model = keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same")(layer(small)))
    path = tmp_path / OUTPUTS[format_name]
    path.write_text("old")
    with pytest.raises(RunError, match=f"{format_name}: .*{reason}") as caught:
        export.export(model, format_name, path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_files_are_overwritten_but_not_folders(format_name, tmp_path):
    model = sizes.any_size(networks.build(RunConfig(), (28, 28, 1)))
    path = tmp_path / OUTPUTS[format_name]
    if format_name == "savedmodel":
        path.mkdir()
    else:
        path.write_text("old")
    export.export(model, format_name, path)
    OPEN[format_name](path)
    if format_name == "savedmodel":
        with pytest.raises(UsageError, match=r"--output: .* exists; expected the name of a new folder"):
            export.export(model, format_name, path)


@pytest.mark.parametrize(
    ("format_name", "output", "message"),
    [
        ("onxx", "model.onnx", r"--format: unknown name 'onxx'; did you mean 'onnx'\? \(known: onnx, litert, savedm"),
        ("onnx", "model.tflite", r"--output: .*model.tflite: expected the name of a \.onnx file"),
        ("litert", "model", r"--output: .*model: expected the name of a \.tflite or \.litert file"),
        ("savedmodel", "model.onnx", r"--output: .*model.onnx: savedmodel is a folder; expected a name without \.onnx"),
        ("savedmodel", "old", r"--output: .*old exists; expected the name of a new folder, or of an empty one"),
        ("savedmodel", "old.txt", r"--output: .*old.txt exists"),
        ("savedmodel", "none/model", r"--output: .*none is not a writable folder"),
    ],
)
def test_request_that_cannot_be_met_is_refused(format_name, output, message, tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old/old.txt", "old.txt"):
        (tmp_path / name).write_text("old")
    with pytest.raises(UsageError, match=message):
        export.check_request(format_name, tmp_path / output)


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    absent = export.FORMATS["onnx"]._replace(modules=("tensorflow", "absent_converter"))
    monkeypatch.setitem(export.FORMATS, "onnx", absent)
    with pytest.raises(UsageError, match=r"--format: onnx needs absent_converter; run `pip install '\.\[export\]'`"):
        export.check_request("onnx", tmp_path / "model.onnx")


PLAIN_TENSORFLOW = """
import sys
import numpy as np, tensorflow as tf
model = tf.saved_model.load("model")
np.save("denoised.npy", model.serve(np.load("noisy.npy"))["denoised"])
assert "dae" not in sys.modules
"""


@pytest.mark.slow
def test_plain_tensorflow_opens_the_savedmodel_without_this_package(mnist, tmp_path):
    model, noisy = sizes.any_size(networks.build(RunConfig(), (28, 28, 1))), noisy_digits(mnist, 5, 28, 36, 1)
    np.save(tmp_path / "noisy.npy", noisy)
    export.export(model, "savedmodel", tmp_path / "model")
    subprocess.run([sys.executable, "-c", PLAIN_TENSORFLOW], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "denoised.npy"), model(noisy), rtol=0, atol=1e-5)
