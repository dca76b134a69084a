"""The first difference between two runs, which should be identical, bit for bit."""

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
NOT_RESULTS = ("seconds/", "_CHECKPOINTABLE_OBJECT_GRAPH")


def first_difference(run: Path, other: Path) -> str | None:
    """Describe the first difference between the results in two run folders; None if they are identical.

    In the order in which a run writes them: the lines of metrics.jsonl, TensorBoard's events, every tensor of the last
    checkpoints (weights, optimizer, best result), the report, the plots. Of a `run` whose checkpoints were removed, as
    in dae/pretrained, only what is left is compared; the report has a digest of the weights.
    """
    results, other_results = dict(_results(run)), dict(_results(other))
    is_whole = (run / "checkpoints").exists()
    for name in results | other_results if is_whole else results:
        values = results.get(name, "missing"), other_results.get(name, "missing")
        if values[0] != values[1]:
            texts = [value if isinstance(value, str) else "present" for value in values]
            return f"{name} differs" if texts[0] == texts[1] else f"{name} is {texts[0]} and {texts[1]}"
    return None


def _results(run: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each result in a run's folder; numbers in JSON files are texts.

    Of texts, NaN equals NaN, and 0.0 differs from -0.0.
    """
    numbered = [(f"{METRICS}, epoch {line['epoch']}", line) for line in read_metrics(run)]
    for file, line in [*numbered, (REPORT, json.loads((run / REPORT).read_text()))]:
        for name, value in line.items():
            if name not in DURATIONS:
                yield f"{file}: {name}", json.dumps(value)
    for name in ("train", "validation", "test"):
        yield from _events(run, f"tensorboard/{name}")
    for name in ("latest", "best"):
        folder = f"checkpoints/{name}"
        for prefix in saved_in(run / folder)[-1:]:
            reader = tf.train.load_checkpoint(str(prefix))
            for key in sorted(reader.get_variable_to_shape_map()):
                if not key.startswith(NOT_RESULTS):
                    array = np.asarray(reader.get_tensor(key))
                    yield f"{folder}: {key}", (array.dtype, array.shape, array.tobytes())
    for name in ("denoised.png", "curves.png"):
        if (run / name).exists():
            yield name, (run / name).read_bytes()


def _events(run: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield each value in the event files of a folder, except durations and run/.

    Raises ValueError if a step has two values.
    """
    names = set()
    for file in sorted((run / folder).glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                name = f"{folder}, step {event.step}: {value.tag}"
                if name in names:
                    raise ValueError(f"{run}: two values of {name}")
                names.add(name)
                if not value.tag.startswith(("speed/", "run/")):
                    yield name, value.tensor.SerializeToString()
