"""Models for other runtimes: ONNX, LiteRT and SavedModel files, each checked in its own runtime before it appears.

Importing this module does not load TensorFlow, so that mistakes in a command are reported at once.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dae.config import RunConfig
from dae.errors import RunError, UsageError, first_line, lookup
from dae.workdir.files import atomic_path, check_output, check_output_folder

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

# The largest difference from the Keras model that is accepted. Correct files differ by some units in the last place,
# about 1e-7, because each runtime adds up in another order.
TOLERANCE = 1e-5

Denoise = Callable[[np.ndarray], np.ndarray]


class Exported(NamedTuple):
    """What the check of an exported file found."""

    largest_difference: float
    """Of any value of any image, from the Keras model."""
    shapes: list[tuple[int, ...]]
    """The shapes [N, H, W, C] of the noisy images that were denoised."""
    runtime: str
    """Name and version of the runtime."""


def export(model: "keras.Model", format_name: str, output: Path) -> Exported:
    """Write `model` in a format of `FORMATS` to a file, or for SavedModel a folder, that needs no Keras.

    It takes `noisy` and returns `denoised`, both float32 [N, H, W, C] in [0, 1], with any N, H and W that `model`
    takes, and computes as in inference. It is checked by `verify` before it appears; an existing file is overwritten.
    Raises UsageError as `check_request` does, and RunError if the format cannot express the model or the check fails.
    """
    check_request(format_name, output)
    with atomic_path(output) as temporary:
        with _failing(f"{format_name}: the model cannot be converted"), _silent():
            FORMATS[format_name].write(model, temporary)
        return verify(temporary, format_name, model)


def check_request(format_name: str, output: Path) -> None:
    """Raise UsageError for an unknown format, an output that does not fit it, or a package that is not installed."""
    format = lookup(FORMATS, format_name, "--format")
    others = [suffix for other in FORMATS.values() for suffix in other.suffixes]
    if format.suffixes:
        check_output(output, format.suffixes, "--output")
    elif output.suffix in others:
        raise UsageError(f"--output: {output}: {format_name} is a folder; expected a name without {output.suffix}")
    else:
        check_output_folder(output, "--output")
    missing = [module for module in format.modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"--format: {format_name} needs {' and '.join(missing)}; run `pip install '.[export]'`")


def verify(path: Path, format_name: str, model: "keras.Model") -> Exported:
    """Denoise MNIST's test digits with an exported file in its own runtime and with `model`, and compare the results.

    The images have two sizes, if `model` takes more than one, and form batches of one and three. Raises RunError if the
    file cannot be run, or if any value differs by more than `TOLERANCE`.
    """
    format, shapes, largest = FORMATS[format_name], _shapes(model), 0.0
    runtime = f"{format.runtime} {importlib.metadata.version(format.runtime)}"
    with _failing(f"{format_name}: {runtime} cannot read the file"), _silent():
        denoise = format.load(path)
    for shape in shapes:
        noisy = _noisy_digits(shape)
        expected = model(noisy, training=False).numpy()
        with _failing(f"{format_name}: {runtime} cannot denoise images {shape}"), _silent():
            denoised = denoise(noisy)
        if (denoised.shape, denoised.dtype) != (expected.shape, np.float32):
            raise RunError(
                f"{format_name}: images {shape} give {denoised.dtype} {denoised.shape}, expected float32 "
                f"{expected.shape}"
            )
        difference = float(np.abs(denoised - expected).max())
        if not difference <= TOLERANCE:  # also for NaN
            raise RunError(
                f"{format_name}: images {shape} differ by up to {difference:.1e} from those of the Keras model, more "
                f"than {TOLERANCE:g}"
            )
        largest = max(largest, difference)
    return Exported(largest, shapes, runtime)


def _shapes(model: "keras.Model") -> list[tuple[int, ...]]:
    """Return the shapes of images to check with: each of two sizes, if there are two, in each of two batches."""
    from dae.models.sizes import fits, fitting_size

    batch, *sides, channels = model.input_shape
    try:
        first = fitting_size(model, *(28 if side is None else side for side in sides))
    except UsageError as error:
        raise RunError(f"{error}; so it cannot be checked") from None
    # A network that halves the sides n times takes steps of 2^n. If it contains a model of one size, it takes no other.
    steps = [int(side is None) for side in sides]
    others = ((first[0] + step * steps[0], first[1] + 2 * step * steps[1]) for step in range(1, 65) if any(steps))
    image_sizes = [first, *itertools.islice((size for size in others if fits(model, *size)), 1)]
    return [(count, *size, channels) for size in image_sizes for count in ((1, 3) if batch is None else (batch,))]


@functools.cache
def _digits() -> np.ndarray:
    """Return a thousand test digits, uint8 [1000, 28, 28, 1]."""
    from dae.data import datasets

    return datasets.load(RunConfig()).test.pixels[:1000].copy()


def _noisy_digits(shape: tuple[int, ...]) -> np.ndarray:
    """Return noisy images, float32 of this shape in [0, 1]: each channel shows other test digits, side by side."""
    import tensorflow as tf

    from dae.data.images import Images
    from dae.data.pipeline import batch_maker

    batch, height, width, channels = shape
    rows, columns = -(-height // 28), -(-width // 28)
    digits = np.resize(_digits(), (batch, channels, rows, columns, 28, 28))
    clean = digits.transpose(0, 2, 4, 3, 5, 1).reshape(batch, rows * 28, columns * 28, channels)
    images = Images(clean[:, :height, :width])
    return batch_maker(images, RunConfig(), "export ")(images.pixels, tf.constant(0)).noisy.numpy()


def _inference(model: "keras.Model") -> "tf.types.experimental.PolymorphicFunction":
    """Return the inference of a copy of `model`, as a `tf.function` from `noisy` to {"denoised": ...}."""
    import keras
    import tensorflow as tf

    def copied(layer: keras.layers.Layer) -> keras.layers.Layer:
        # Keras repeats pixels by an operation whose number of channels LiteRT does not know if the size is free.
        if isinstance(layer, keras.layers.UpSampling2D) and layer.data_format == "channels_last":
            return keras.layers.Lambda(
                lambda images: tf.image.resize(images, tf.shape(images)[1:3] * layer.size, layer.interpolation),
                name=layer.name,
            )
        return layer.__class__.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
    copy.set_weights(model.get_weights())

    @tf.function(input_signature=[tf.TensorSpec(model.input_shape, tf.float32, name="noisy")], autograph=False)
    def denoise(noisy: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"denoised": copy(noisy, training=False)}

    return denoise


def _write_savedmodel(model: "keras.Model", path: Path) -> None:
    import keras

    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", _inference(model))
    archive.write_out(path, verbose=False)


def _load_savedmodel(path: Path) -> Denoise:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return lambda noisy: loaded.signatures["serving_default"](noisy=tf.constant(noisy))["denoised"].numpy()


def _write_onnx(model: "keras.Model", path: Path) -> None:
    import tf2onnx

    denoise = _inference(model)
    proto, _ = tf2onnx.convert.from_function(denoise, denoise.input_signature)
    for tensor in (*proto.graph.input, *proto.graph.output):
        for dimension, name in zip(tensor.type.tensor_type.shape.dim, ("batch", "height", "width"), strict=False):
            if not dimension.dim_value:  # free
                dimension.dim_param = name
    path.write_bytes(proto.SerializeToString())


def _load_onnx(path: Path) -> Denoise:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda noisy: session.run(["denoised"], {"noisy": noisy})[0]


def _write_litert(model: "keras.Model", path: Path) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        _write_savedmodel(model, Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        path.write_bytes(converter.convert())


def _load_litert(path: Path) -> Denoise:
    from ai_edge_litert.interpreter import Interpreter

    denoise = Interpreter(str(path)).get_signature_runner("serving_default")  # it resizes the input
    return lambda noisy: denoise(noisy=noisy)["denoised"]


class Format(NamedTuple):
    """A format of files, and its runtime."""

    suffixes: tuple[str, ...]
    """Of its files; empty for a format that is a folder."""
    modules: tuple[str, ...]
    """Those of the extra `export` that it needs."""
    runtime: str
    """The package that runs its files."""
    write: Callable[["keras.Model", Path], None]
    load: Callable[[Path], Denoise]


FORMATS = {
    "onnx": Format((".onnx",), ("tf2onnx", "onnxruntime"), "onnxruntime", _write_onnx, _load_onnx),
    "litert": Format((".tflite", ".litert"), ("ai_edge_litert",), "ai-edge-litert", _write_litert, _load_litert),
    "savedmodel": Format((), (), "tensorflow", _write_savedmodel, _load_savedmodel),
}


@contextlib.contextmanager
def _failing(problem: str) -> Iterator[None]:
    """Raise any exception as `RunError("problem (reason)")`, where the reason is one line."""
    try:
        yield
    except Exception as error:  # the converters and runtimes raise many types
        operations = re.search(r"(TF Select|Custom) ops: .+|No Op registered for \w+", str(error))
        raise RunError(f"{problem} ({operations.group() if operations else first_line(error)})") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what is logged, warned of, or written to the file descriptor of stderr, as converters do at length.

    With TF_CPP_MIN_LOG_LEVEL=0 it is shown.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable()
    sys.stderr.flush()
    shown, hidden = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(hidden, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(hidden)
        logging.disable(disabled)
