"""An estimate, before the first step, of the memory that a run needs; a process that needs too much would be killed."""

import math
from pathlib import Path

import keras
import tensorflow as tf

from dae.errors import warn

_MEMINFO = Path("/proc/meminfo")


def warn_if_scarce(model: keras.Model, batch_size: float) -> None:
    """Warn if a training step of `batch_size` images probably needs more memory than is available.

    A step keeps the outputs of layers with weights, the gradients of two outputs, and a few batches ahead. Layers
    within a layer are not counted. The estimate was 0.75 to 1.4 of the peak memory of runs with the networks here, by
    `/usr/bin/time -v`. There is no warning on a GPU, or on a system other than Linux: the available memory is unknown
    there.
    """
    if tf.config.get_visible_devices("GPU") or not _MEMINFO.exists():
        return
    height, width, channels = model.input_shape[1:]
    tensors = [tensor for layer in model.layers if layer.weights for tensor in keras.tree.flatten(layer.output)]
    outputs = [math.prod(side or 1 for side in tensor.shape[1:]) for tensor in tensors]
    values_per_image = sum(outputs) + 2 * max(outputs, default=0) + 4 * height * width * channels
    needed = 4 * values_per_image * batch_size
    words = _MEMINFO.read_text(encoding="utf-8").split()
    available = 1024 * int(words[words.index("MemAvailable:") + 1])
    if needed > available:
        warn(
            f"--batch-size, --patch-size: a step with {batch_size:g} images of {height} x {width} needs about "
            f"{needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available; if the process is killed, "
            "use smaller ones"
        )
