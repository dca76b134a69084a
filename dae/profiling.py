"""Where the time of a training step goes."""

import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

Batch = TypeVar("Batch")

# The first steps are slower than the others, and no example of them.
FIRST, LAST = 10, 15


def traced(batches: Iterable[Batch], folder: Path, say: Callable[[str], object]) -> Iterator[Batch]:
    """Hands on the batches, and profiles what is done with a few of them.

    Writes plugins/profile/TIME/ in `folder`: *.xplane.pb for TensorBoard's profile plugin and trace.json.gz for
    Perfetto and chrome://tracing. Where it is, goes to `say`.
    """
    number, running = -1, False
    try:
        for number, batch in enumerate(batches):
            if number == FIRST:
                tf.profiler.experimental.start(str(folder))
                running = True
            if number == LAST:
                running = False
                _finish(folder, say)
            yield batch
    finally:
        if running:
            _finish(folder, say)
        elif number < FIRST:
            skipped = f"that begins after {FIRST} steps and there were {number + 1}"
            print(f"warning: --profile: no profile, since {skipped}", file=sys.stderr)


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
