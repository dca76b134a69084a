"""Measure what training on several workers costs: `python experiments/benchmarks/scaling.py`.

Times are medians on this machine.
"""

import dataclasses
import statistics

from measure import Program, epochs_in_turn

from dae import cli
from dae.config import RunConfig


@dataclasses.dataclass(frozen=True)
class ScalingArguments:
    """Measure images per second of one process and of two workers, and the time of messages between them."""

    model: str = "conv"
    """Network, as in run.py."""
    batch_size: int = 128
    """Images per training step, of all workers."""
    steps: int = 300
    """Steps per measurement."""
    rounds: int = 5
    """Measurements, of which the median is taken, after one for warm-up."""


def main() -> None:
    arguments = cli.parse(ScalingArguments)
    steps, half = arguments.steps, arguments.batch_size // 2
    config = RunConfig(model=arguments.model, shards=2, intra_op_threads=1, epochs=10**4)  # more than are timed
    batch = dataclasses.replace(config, batch_size=2 * half, train_examples=2 * half * steps)
    programs = {
        "one process with two shards": Program("several workers", batch),
        "two workers with one shard each": Program("several workers", batch, workers=2),
        "pipeline": Program("pipeline", batch),
        "messages": Program("messages", RunConfig(), workers=2),
    }
    epochs = epochs_in_turn(programs, arguments.rounds)
    rounds = [dict(epoch["messages"]) for epoch in epochs.pop("messages")]
    messages = {size: statistics.median(seconds[size] for seconds in rounds) for size in rounds[0]}
    sent = epochs["one process with two shards"][0]["bytes"]
    pipeline = statistics.median(epoch["seconds"] for epoch in epochs.pop("pipeline"))
    seconds = {name: statistics.median(epoch["seconds"] for epoch in reports) for name, reports in epochs.items()}
    print(f"{arguments.model}, {2 * half} images per step, {sent / 1e3:,.1f} kB sent by each worker per step")
    for name, reports in epochs.items():
        rate, milliseconds = reports[0]["images"] / seconds[name], 1e3 * seconds[name] / steps
        print(f"{name}: {rate:,.0f} images/s, {milliseconds:.2f} ms per step")
    # Both compute the same on the same cores.
    together, apart = seconds.values()
    print(f"fraction of communication in a step of two workers: {1 - together / apart:.0%}")
    print(
        f"pipeline: {1e3 * pipeline / steps:.2f} ms per batch, as long as a step of {together / pipeline:.0f} workers"
    )
    print(f"messages: {', '.join(f'{size / 1e3:,.0f} kB in {1e3 * time:.2f} ms' for size, time in messages.items())}")


if __name__ == "__main__":
    cli.run(main)
