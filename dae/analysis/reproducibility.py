"""Whether two runs are identical, bit for bit, and if not, what differs first."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dae.training.checkpoints import saved_in
from dae.workdir.workdir import METRICS, REPORT, read_metrics

# Durations are not results.
DURATIONS = ("seconds", "images_per_second")
IMAGES = ("denoised.png", "curves.png")
NOT_RESULTS = ("seconds/", "_CHECKPOINTABLE_OBJECT_GRAPH")


def first_difference(run: Path, other: Path) -> str | None:
    """Describe the first difference between the results in two run folders; None if they are identical.

    In the order in which a run writes them: the lines of metrics.jsonl, TensorBoard's events, every tensor of the last
    checkpoints (weights, optimizer, best result), the report, the plots.
    """
    for difference in _differences(run, other):
        return difference
    return None


def _differences(run: Path, other: Path) -> Iterator[str]:
    lines, other_lines = read_metrics(run), read_metrics(other)
    for line, other_line in zip(lines, other_lines, strict=False):
        yield from _field_differences(f"{METRICS}, epoch {line['epoch']}", line, other_line)
    if len(lines) != len(other_lines):
        yield f"{METRICS}: {len(lines)} epochs and {len(other_lines)}"
    for name in ("train", "validation", "test"):
        folder = Path("tensorboard") / name
        events, other_events = _events(run / folder), _events(other / folder)
        for (step, tag), value in events.items():
            if other_events.get((step, tag)) != value:
                yield f"{folder}, step {step}: {tag}"
        if events.keys() != other_events.keys():
            yield f"{folder}: {len(events)} values and {len(other_events)}"
    for name in ("latest", "best"):
        folder = Path("checkpoints") / name
        tensors, other_tensors = _tensors(run / folder), _tensors(other / folder)
        if tensors.keys() != other_tensors.keys():
            yield f"{folder}: the names of the tensors"
        for key, tensor in tensors.items():
            if _bits(tensor) != _bits(other_tensors[key]):
                yield f"{folder}: {key}"
    yield from _field_differences(REPORT, *(json.loads((folder / REPORT).read_text()) for folder in (run, other)))
    for name in IMAGES:
        if (run / name).read_bytes() != (other / name).read_bytes():
            yield name


def _field_differences(where: str, values: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for name in values | other:
        # As text, in which NaN equals NaN, and 0.0 differs from -0.0.
        if name not in DURATIONS and json.dumps(values.get(name)) != json.dumps(other.get(name)):
            yield f"{where}: {name} is {values.get(name)} and {other.get(name)}"


def _events(folder: Path) -> dict[tuple[int, str], bytes]:
    """Return the value of every (step, tag) in the event files of a folder, except durations and run/.

    Raises ValueError if a step has two values.
    """
    values: dict[tuple[int, str], bytes] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if (event.step, value.tag) in values:
                    raise ValueError(f"{folder}: two values of {value.tag} at step {event.step}")
                if not value.tag.startswith(("speed/", "run/")):
                    values[event.step, value.tag] = value.tensor.SerializeToString()
    return values


def _bits(tensor: np.ndarray | bytes) -> tuple:
    array = np.asarray(tensor)
    return array.dtype, array.shape, array.tobytes()


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return every result in the last checkpoint of a folder by its name there; empty if there is none."""
    prefixes = saved_in(folder)
    if not prefixes:
        return {}
    reader = tf.train.load_checkpoint(str(prefixes[-1]))
    return {
        key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map() if not key.startswith(NOT_RESULTS)
    }
