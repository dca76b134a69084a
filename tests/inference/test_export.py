"""Exported files, opened as their users open them: by their own runtime, without this package's functions."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import not_the_identity, small_network

from dae.config import RunConfig
from dae.data.values import NOTE, ValueRange
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
    for module in export.FORMATS[format_name][1]:
        pytest.importorskip(module, reason="needs the extra `export`")


def open_onnx(path: Path) -> Denoise:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (noisy,), (denoised,) = session.get_inputs(), session.get_outputs()
    assert (noisy.name, noisy.type) == ("noisy", "tensor(float)")
    assert (denoised.name, denoised.type) == ("denoised", "tensor(float)")
    assert len(noisy.shape) == len(denoised.shape) == 4
    assert noisy.shape[1:3] == [28, 28] or all(isinstance(side, str) for side in noisy.shape[:3])
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


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, np.float32)


def layers_of_all_kinds(image_shape: tuple[int, int, int]) -> keras.Model:
    """Return a user's network: batch normalization, dropout, a nested model, attention, and a layer used twice."""
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


@pytest.mark.parametrize(("build", "channels"), [
    (networks.MODELS["residual_unet"], 1),
    (networks.MODELS["dncnn"], 1),
    (layers_of_all_kinds, 3),
])  # fmt: skip
def test_exported_network_denoises_the_same_in_other_sizes_and_batches(build, channels, format_name, tmp_path):
    model = not_the_identity(sizes.any_size(build((28, 28, channels))))
    model(random_images(4, 28, 28, channels), training=True)  # batch normalization then has other moving means
    path = tmp_path / OUTPUTS[format_name]
    if format_name == "savedmodel":
        path.mkdir()  # an empty folder is not in the way
    else:
        path.write_text("old")
    differences = export.export(model, format_name, path)
    assert len(differences) == 4
    assert max(differences.values()) < export.TOLERANCE
    denoise = OPEN[format_name](path)
    for shape in [(1, 28, 28), (4, 28, 28), (1, 36, 44), (2, 36, 44)]:
        noisy = random_images(*shape, channels)
        np.testing.assert_allclose(denoise(noisy), model(noisy, training=False), rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [OUTPUTS[format_name]]


def test_network_that_pads_and_crops_is_checked_on_sizes_that_it_takes(format_name, tmp_path):
    model = sizes.any_size(networks.build(RunConfig(), (30, 27, 1)))  # takes 30 + 8 n and 27 + 8 n
    differences = export.export(model, format_name, tmp_path / OUTPUTS[format_name])
    assert list(differences) == [(1, 30, 35, 1), (3, 30, 35, 1), (1, 38, 59, 1), (3, 38, 59, 1)]
    denoise, noisy = OPEN[format_name](tmp_path / OUTPUTS[format_name]), random_images(2, 46, 35, 1)
    np.testing.assert_allclose(denoise(noisy), model(noisy), rtol=0, atol=1e-5)


def test_network_of_one_size_stays_so(format_name, tmp_path):
    layers = keras.layers
    flat = [layers.Flatten(), layers.Dense(9, activation="relu"), layers.Dense(784), layers.Reshape((28, 28, 1))]
    model = sizes.any_size(keras.Sequential([keras.Input((28, 28, 1)), *flat]))
    differences = export.export(model, format_name, tmp_path / OUTPUTS[format_name])
    assert list(differences) == [(1, 28, 28, 1), (3, 28, 28, 1)]
    denoise, noisy = OPEN[format_name](tmp_path / OUTPUTS[format_name]), random_images(2, 28, 28, 1)
    np.testing.assert_allclose(denoise(noisy), model(noisy), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match=r"(?i)shape|dimension"):  # each runtime has its own error
        denoise(random_images(2, 36, 44, 1))


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


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    suffixes, _, load = export.FORMATS["onnx"]
    monkeypatch.setitem(export.FORMATS, "onnx", (suffixes, ("tensorflow", "absent_converter"), load))
    with pytest.raises(UsageError, match=r"--format: onnx needs absent_converter; run `pip install '\.\[export\]'`"):
        export.check_request("onnx", tmp_path / "model.onnx")


def test_an_exported_model_holds_its_value_range_and_computes_the_same(format_name, tmp_path):
    model, output = sizes.any_size(small_network((28, 28, 1))), tmp_path / OUTPUTS[format_name]
    model.dae_value_range = ValueRange(0, 4095, "uint16")
    export.export(model, format_name, output)
    if format_name == "onnx":
        import onnx

        (text,) = [entry.value for entry in onnx.load(output).metadata_props if entry.key == NOTE]
    elif format_name == "litert":
        with zipfile.ZipFile(output) as archive:
            text = archive.read(NOTE)
    else:
        text = (output / NOTE).read_text()
    assert ValueRange.from_json(text) == model.dae_value_range
    images = random_images(2, 28, 28, 1)
    np.testing.assert_allclose(OPEN[format_name](output)(images), model(images), atol=1e-5)
