"""Whether a batch fits into memory, estimated before the first step; TensorFlow would end the process."""

import math
import resource
from pathlib import Path

import keras

from dae.config import RunConfig
from dae.data.datasets import Splits
from dae.data.examples import examples_per_epoch
from dae.data.pipeline import evaluation_batch_size
from dae.errors import UsageError
from dae.models.sizes import layers_at

# Memory to evaluate whole images, relative to that of a training step with as many pixels: for inference no layer's
# output is kept. Measured: 0.2 (dncnn) to 0.6 (patches). A low figure, because what is refused cannot be tried.
EVALUATION = 0.2
# The share of the available memory that a step may need by its estimate; one that needed 0.85 by its estimate failed.
USABLE = 0.8


def check(config: RunConfig, model: keras.Model, splits: Splits, workers: int = 1) -> None:
    """Raise UsageError if a training step, or the evaluation of a batch of whole images, needs more than is available.

    Names the batch size or the settings that would probably fit.
    """
    height, width, channels = model.input_shape[1:]
    image_bytes = step_bytes(model)
    batch_size = min(config.batch_size, examples_per_epoch(splits.train, config))
    available = USABLE * available_memory()
    needed = image_bytes * batch_size / workers
    if needed > available:
        fitting = int(batch_size * available / needed / 2)
        fits = f"about {fitting} images would fit" if fitting else "not even one would fit"
        smaller = "a smaller --patch-size" if config.patch_size else "--patch-size or --image-size"
        raise UsageError(
            f"--batch-size: a step with {batch_size} images of {height} x {width} x {channels} needs about "
            f"{_gigabytes(needed)} of memory, and {_gigabytes(available)} can be used; {fits}; or use {smaller}"
        )
    for part in (splits.validation, splits.test):
        if config.patch_size is not None and len(part):
            sides = part.shapes[part.shapes.prod(axis=1).argmax()]
            count = min(len(part), evaluation_batch_size(part, config))
            needed = EVALUATION * image_bytes * count * float(sides.prod()) / (height * width)
            if needed > available:
                raise UsageError(
                    f"--data: to evaluate a whole image of {sides[0]} x {sides[1]} needs about {_gigabytes(needed)} "
                    f"of memory, and {_gigabytes(available)} can be used; leave out images of that size"
                )


def step_bytes(model: keras.Model) -> int:
    """Return the estimated memory of a training step per image.

    Kept are the outputs of the layers with weights; and there are gradients of two outputs at once, and a few batches
    ahead. It was 0.75 to 1.4 of the peak memory of runs with the networks here, as `/usr/bin/time -v` measures it.
    """
    height, width, channels = model.input_shape[1:]
    outputs = [returned for layer, _, returned in layers_at(model, height, width) if layer.weights]
    return 4 * (sum(outputs) + 2 * max(outputs, default=0) + 4 * height * width * channels)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def available_memory() -> float:
    """Return the bytes that this process can still allocate: by the machine, its control group and `ulimit -v`."""
    limits = []
    meminfo = _numbers("/proc/meminfo")
    if "MemAvailable:" in meminfo:
        limits.append(1024 * meminfo["MemAvailable:"])
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - 1024 * _numbers("/proc/self/status").get("VmSize:", 0))
    group, used = (_first_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if group is not None and used is not None:
        # Files that the system keeps in memory count as used, but are dropped when memory is needed.
        cache = _numbers("/sys/fs/cgroup/memory.stat")
        limits.append(group - used + cache.get("active_file", 0) + cache.get("inactive_file", 0))
    return max(0, min(limits, default=math.inf))


def _numbers(path: str) -> dict[str, int]:
    """Return the numbers of a file of /proc, in units of 1024 bytes, or of a control group, by the words before them;
    nothing if there is no such file.
    """
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _first_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such limit, or "max"
        return None
