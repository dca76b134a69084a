"""Where the time of a training step goes."""

import contextlib
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from dae.data.pipeline import Batch
from dae.training.train_step import TrainSteps

# The first calls of the train steps are slower than the others, and no example of them.
PROFILED_CALL = 4


@contextlib.contextmanager
def traced(train_steps: TrainSteps, folder: Path, say: Callable[[str], object]) -> Iterator[TrainSteps]:
    """`train_steps`, of which one call is profiled: the steps of a tenth of a second, at least one.

    Writes plugins/profile/TIME/ in `folder`: *.xplane.pb for TensorBoard's profile plugin and trace.json.gz for
    Perfetto and chrome://tracing. Where it is, goes to `say`.
    """
    calls = 0

    def profiled(batches: Iterator[Batch], count: tf.Tensor) -> tf.Tensor:
        nonlocal calls
        calls += 1
        if calls != PROFILED_CALL:
            return train_steps(batches, count)
        tf.profiler.experimental.start(str(folder))
        try:
            return train_steps(batches, count)
        finally:
            _finish(folder, say)

    yield profiled
    if calls < PROFILED_CALL:
        print("warning: --profile: no profile, since too few steps came before the last of epochs", file=sys.stderr)


def _finish(folder: Path, say: Callable[[str], object]) -> None:
    tf.profiler.experimental.stop()
    written = max((folder / "plugins" / "profile").glob("*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    space = xplane_pb2.XSpace.FromString(written.read_bytes())
    # Chrome's trace format: names of processes and threads ("M") and complete events ("X"), times in microseconds.
    events: list[dict[str, Any]] = []
    for pid, plane in enumerate(space.planes):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": plane.name}})
        for line in plane.lines:
            place = {"pid": pid, "tid": line.id}
            events.append({"ph": "M", **place, "name": "thread_name", "args": {"name": line.name}})
            events += (
                {
                    "ph": "X",
                    **place,
                    "name": plane.event_metadata[event.metadata_id].name,
                    "ts": line.timestamp_ns / 1e3 + event.offset_ps / 1e6,
                    "dur": event.duration_ps / 1e6,
                }
                for event in line.events
            )
    trace = written.parent / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    say(f"profile: {trace}")
