"""Measure what training on several workers costs: `python experiments/benchmarks/scaling.py`.

Times are medians on this machine. The table for 1 to 64 workers is a model: the measured time of a step for a worker's
share of the batch, plus the time of the ring of messages, from the measured times of messages between workers here.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from dae import cli
from dae.config import RunConfig
from dae.errors import RunError

# Float32 values per message, from which latency and bandwidth are fitted.
SIZES = (1_000, 10_000, 100_000, 1_000_000)
REPEATS = 200


@dataclasses.dataclass(frozen=True)
class ScalingArguments:
    """Measure images per second of one process and of two workers, the time of messages, and model more workers."""

    model: str = "conv"
    """Network, as in run.py."""
    batch_size: int = 128
    """Images per training step, of all workers."""
    steps: int = 300
    """Steps per measurement."""
    rounds: int = 5
    """Measurements, of which the median is taken."""
    max_workers: int = 4
    """Measure the messages of two workers and more, up to this many."""
    latency: float | None = None
    """Milliseconds per message in the model (default: as measured between processes of this machine)."""
    bandwidth: float | None = None
    """Megabytes per second between two workers in the model (default: as measured here)."""
    task: str | None = None
    """What a process that this script starts measures."""


def steps(arguments: ScalingArguments, batch_size: int, shards: int) -> dict[str, float]:
    """Return seconds per step of this process, or of this worker with the others, and the bytes of its message."""
    import tensorflow as tf

    from dae import replicas
    from dae.data.pipeline import training_batches
    from dae.training.task import prepare
    from dae.training.train_state import TrainState
    from dae.training.train_step import make_train_loop, make_train_step

    group = replicas.from_environment()
    config = RunConfig(model=arguments.model, batch_size=batch_size, shards=shards, intra_op_threads=1, epochs=10**4)
    task = prepare(dataclasses.replace(config, train_examples=50 * batch_size), replicas=group)
    state = TrainState(task.model, task.loss, task.optimizer)
    step = make_train_step(state, task.objective(state.step), task.config, mixes_bce=False, replicas=group)
    loop = make_train_loop(step, shards, group)
    batches = iter(training_batches(task.data.train, task.config, replicas=group))
    seconds = []
    for _ in range(arguments.rounds + 1):
        start = time.perf_counter()
        loop(batches, tf.constant(arguments.steps), batch_size)
        seconds.append((time.perf_counter() - start) / arguments.steps)
    values = sum(int(np.prod(weight.shape)) for weight in state.trainable_variables) + len(task.loss.names)
    return {"seconds": statistics.median(seconds[1:]), "bytes": 4.0 * values}


def messages(arguments: ScalingArguments) -> dict[str, float]:
    """Return the seconds that it takes to gather a tensor from all workers, by its number of values, from SIZES."""
    import tensorflow as tf

    from dae import replicas

    group = replicas.from_environment()
    group.connect()

    @tf.function
    def gather(own: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0.0)
        for _ in tf.range(REPEATS):
            total += tf.reduce_sum(group.gather(own + total)[:, 0])
        return total

    seconds = {}
    for size in SIZES:
        own, found = tf.zeros([1, size]), []
        for _ in range(arguments.rounds + 1):
            start = time.perf_counter()
            gather(own)
            found.append((time.perf_counter() - start) / REPEATS)
        seconds[str(size)] = statistics.median(found[1:])
    return seconds


def measure(arguments: ScalingArguments, task: str, workers: int = 1) -> dict[str, float]:
    """Run a task of this script in so many other processes, and return what the first of them has found."""
    from dae.replicas import local_tf_configs

    settings = {**vars(arguments), "task": task}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *flags], env={**os.environ, "TF_CONFIG": tf_config}, stdout=subprocess.PIPE
        )
        for tf_config in local_tf_configs(workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RunError(f"the measurement {task} failed")
    return json.loads(outputs[0].splitlines()[-1])


def fitted(seconds: dict[str, float]) -> tuple[float, float]:
    """Return the latency in seconds, and the bandwidth in bytes per second, of a message between two workers."""
    sizes = np.array([4.0 * int(size) for size in seconds])
    slope, latency = np.polyfit(sizes, list(seconds.values()), 1, w=1 / np.array(list(seconds.values())))
    return max(latency, 0.0), 1 / slope


def main() -> None:
    arguments = cli.parse(ScalingArguments)
    if arguments.task is not None:
        cli.import_tensorflow()
        kind, *numbers = arguments.task.split()
        found = messages(arguments) if kind == "messages" else steps(arguments, *map(int, numbers))
        print(json.dumps(found))
        return
    batch_size = arguments.batch_size
    one, two = (measure(arguments, f"steps {batch_size} 2", workers) for workers in (1, 2))
    half = measure(arguments, f"steps {batch_size // 2} 1")
    print(f"{arguments.model}, {batch_size} images per step, {one['bytes'] / 1e3:,.1f} kB sent by each worker per step")
    for name, found in (("one process with two shards", one), ("two workers with a shard each", two)):
        print(f"{name}: {batch_size / found['seconds']:,.0f} images/s, {1e3 * found['seconds']:.2f} ms per step")
    print(f"one process with one of these shards: {1e3 * half['seconds']:.2f} ms per step")
    # Both compute the same on the same cores.
    print(f"share of communication in a step of two workers: {1 - one['seconds'] / two['seconds']:.0%}")
    times = {workers: measure(arguments, "messages", workers) for workers in range(2, arguments.max_workers + 1)}
    for workers, seconds in times.items():
        columns = (f"{4e-3 * int(size):,.0f} kB in {1e3 * each:.2f} ms" for size, each in seconds.items())
        print(f"messages of {workers} workers: {', '.join(columns)}")
    latency, bandwidth = fitted(times[2])
    latency = latency if arguments.latency is None else arguments.latency / 1e3
    bandwidth = bandwidth if arguments.bandwidth is None else arguments.bandwidth * 1e6
    print(f"model: {1e3 * latency:.2f} ms and {bandwidth / 1e6:,.0f} MB/s per message")
    print(f"each worker computes {batch_size // 2} images per step, in {1e3 * half['seconds']:.2f} ms:")
    print("| workers | exact: ms for messages | images/s | fast: ms for messages | images/s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for workers in (1, 2, 4, 8, 16, 32, 64):
        # A ring of n workers: each sends its sums n - 1 times on. Or these are added on the way, in n parts, which
        # takes 2 (n - 1) messages, without those that tell their size.
        exact = (workers - 1) * (latency + one["bytes"] / bandwidth)
        fast = (workers - 1) * (latency + 2 * one["bytes"] / workers / bandwidth)
        rates = [workers * batch_size / 2 / (half["seconds"] + each) for each in (exact, fast)]
        print(f"| {workers} | {1e3 * exact:.2f} | {rates[0]:,.0f} | {1e3 * fast:.2f} | {rates[1]:,.0f} |")


if __name__ == "__main__":
    cli.run(main)
