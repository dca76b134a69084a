"""Models for other runtimes: ONNX, LiteRT and SavedModel files, each checked in its own runtime before it appears.

Importing this module does not load TensorFlow, so that mistakes in a command are reported at once.
"""

import contextlib
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dae.errors import RunError, UsageError, first_line, lookup, muted_stderr
from dae.files import atomic_path, check_output

if TYPE_CHECKING:
    import keras

# The largest difference from the Keras model that is accepted. Correct files differ by some units in the last place,
# about 1e-7, because each runtime adds up in another order.
TOLERANCE = 1e-5

Denoise = Callable[[np.ndarray], np.ndarray]


def export(model: "keras.Model", format_name: str, output: Path) -> dict[tuple[int, ...], float]:
    """Write `model` in a format of `FORMATS` to a file, or for SavedModel a folder, that needs no Keras.

    It takes `noisy` and returns `denoised`, both float32 [N, H, W, C] in [0, 1], with any N, H and W that `model`
    takes, and computes as in inference. It is checked by `verify`, whose result is returned, before it appears; an
    existing file is overwritten. Raises UsageError as `check_request` does, and RunError if the format cannot express
    the model or the check fails.
    """
    check_request(format_name, output)
    with atomic_path(output) as temporary:
        for _ in range(2):  # in about one of a hundred files, tf2onnx's optimizer gives the output a wrong shape
            with _converting(f"{format_name}: the model cannot be converted"):
                _write(model, format_name, temporary)
            with contextlib.suppress(RunError):
                return verify(temporary, format_name, model)
        return verify(temporary, format_name, model)


def check_request(format_name: str, output: Path) -> None:
    """Raise UsageError for an unknown format, an output that does not fit it, or a package that is not installed."""
    suffixes, modules, _ = lookup(FORMATS, format_name, "--format")
    check_output(output, suffixes, "--output")
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"--format: {format_name} needs {' and '.join(missing)}; run `pip install '.[export]'`")


def verify(path: Path, format_name: str, model: "keras.Model") -> dict[tuple[int, ...], float]:
    """Denoise random images with an exported file in its own runtime and with `model`, and compare the results.

    The images have two sizes, if `model` takes more than one, and form batches of one and three. Returns the largest
    difference of any value by the shape of the images. Raises RunError if the file cannot be run, or if a difference
    exceeds `TOLERANCE`.
    """
    from dae.models.fused_layers import outputs
    from dae.models.sizes import fitting_size, view_of_any_size

    view = view_of_any_size(model)
    batch, height, width, channels = view.input_shape
    first = fitting_size(model, height or 28, width or 28)
    second = fitting_size(model, height or first[0] + 1, width or first[1] + 17)
    _, _, load = FORMATS[format_name]
    with _converting(f"{format_name}: the file cannot be read"):
        denoise = load(path)
    differences = {}
    for size, count in itertools.product(dict.fromkeys((first, second)), (1, 3) if batch is None else (batch,)):
        shape = (count, *size, channels)
        noisy = np.random.default_rng(0).random(shape, np.float32)
        expected = outputs(view, noisy)
        with _converting(f"{format_name}: the file cannot denoise images {shape}"):
            denoised = denoise(noisy)
        if denoised.shape != expected.shape:
            raise RunError(f"{format_name}: images {shape} give {denoised.shape}, expected {expected.shape}")
        differences[shape] = float(np.abs(denoised - expected).max())
        if not differences[shape] <= TOLERANCE:  # also for NaN
            raise RunError(
                f"{format_name}: images {shape} differ by up to {differences[shape]:.1e} from those of the Keras "
                f"model, more than {TOLERANCE:g}"
            )
    return differences


def _write(model: "keras.Model", format_name: str, path: Path) -> None:
    """Write the inference of `model`, from `noisy` to `denoised`, by Keras's own export."""
    import keras
    import tensorflow as tf

    from dae.models.sizes import view_of_any_size

    view = view_of_any_size(model)
    noisy = keras.Input(batch_shape=view.input_shape, name="noisy")
    signature = [tf.TensorSpec(view.input_shape, tf.float32, name="noisy")]
    options = {"input_signature": signature, "verbose": False}
    written = path
    if format_name == "litert":
        # Keras would allow operations of TensorFlow too, which the runtime lacks.
        options["target_spec"] = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
        written = path.with_suffix(".tflite")  # Keras takes no other suffix
    keras_format = "tf_saved_model" if format_name == "savedmodel" else format_name
    keras.Model(noisy, {"denoised": view(noisy)}).export(written, keras_format, **options)
    written.rename(path)


def _load_savedmodel(path: Path) -> Denoise:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return lambda noisy: loaded.signatures["serving_default"](noisy=tf.constant(noisy))["denoised"].numpy()


def _load_onnx(path: Path) -> Denoise:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda noisy: session.run(["denoised"], {"noisy": noisy})[0]


def _load_litert(path: Path) -> Denoise:
    from ai_edge_litert.interpreter import Interpreter

    denoise = Interpreter(str(path)).get_signature_runner("serving_default")  # it resizes the input
    return lambda noisy: denoise(noisy=noisy)["denoised"]


# The suffixes of a format's files (none if it is a folder), the modules that it needs, and how its runtime reads it.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Path], Denoise]]] = {
    "onnx": ((".onnx",), ("tf2onnx", "onnx", "onnxruntime"), _load_onnx),
    "litert": ((".tflite", ".litert"), ("ai_edge_litert",), _load_litert),
    "savedmodel": ((), (), _load_savedmodel),
}


@contextlib.contextmanager
def _converting(problem: str) -> Iterator[None]:
    """Discard what is written to stderr, and raise any exception as `RunError("problem (reason)")`, in one line."""
    with muted_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # the converters and runtimes raise many types
            operations = re.search(r"(TF Select|Custom) ops: .+|No Op registered for \w+", str(error))
            raise RunError(f"{problem} ({operations.group() if operations else first_line(error)})") from None
