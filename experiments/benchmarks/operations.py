"""Show which operations the time of a training step is spent in: `python experiments/benchmarks/operations.py`."""

import collections
import dataclasses
import re
import tempfile
from pathlib import Path

from measure import table

from dae import cli
from dae.config import RunConfig
from dae.errors import RunError


@dataclasses.dataclass(frozen=True)
class OperationsArguments(cli.ConfigArguments, cli.PresetArguments):
    """Print the time of each kind of operation, summed over threads, in a training step and in making its batch."""

    steps: int = 200
    """Steps to profile, after as many for warm-up."""


def profiled(config: RunConfig, steps: int, folder: Path) -> None:
    """Train for twice as many steps, and write TensorFlow's profile of the second half to a folder."""
    import tensorflow as tf

    from dae.data.pipeline import training_batches
    from dae.training.task import prepare
    from dae.training.train_step import make_train_loop, make_train_step

    task = prepare(config)
    state = task.new_state()
    train_step = make_train_step(state, task.objective(state.step), task.network, task.replicas)
    train_loop = make_train_loop(train_step, state)
    batches = iter(training_batches(task.data.train, config))
    train_loop(batches, steps, config.batch_size)
    with tf.profiler.experimental.Profile(str(folder)):
        float(train_loop(batches, steps, config.batch_size))


def milliseconds(folder: Path) -> dict[str, float]:
    """Return the total time of each kind of operation in a profile."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    for path in folder.rglob("*.xplane.pb"):
        space.MergeFromString(path.read_bytes())
    total: dict[str, float] = collections.defaultdict(float)
    for plane in space.planes:
        names = {key: metadata.name for key, metadata in plane.event_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                # The names of operations are `scope/name:Kind`; others are those of threads, functions and C++ calls.
                if found := re.fullmatch(r"(?:[\w.]+/)*[\w.]+:(\w+)", names[event.metadata_id]):
                    total[found[1]] += event.duration_ps / 1e9
    if not total:
        raise RunError("TensorFlow's profile has no operations")
    return total


def main() -> None:
    arguments = cli.parse_config(OperationsArguments)
    config = dataclasses.replace(arguments.config, epochs=100)
    cli.import_tensorflow(config.onednn)
    with tempfile.TemporaryDirectory() as folder:
        profiled(config, arguments.steps, Path(folder))
        total = milliseconds(Path(folder))
    everything = sum(total.values())
    rows = [
        [kind, f"{time / arguments.steps:.3f}", f"{time / everything:.1%}"]
        for kind, time in sorted(total.items(), key=lambda item: -item[1])
        if time > 0.01 * everything
    ]
    print(table(["operation", "ms per step", "of all"], rows))


if __name__ == "__main__":
    cli.run(main)
