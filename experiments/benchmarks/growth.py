"""Measure how the cost of training grows: `python experiments/benchmarks/growth.py`; see `--help`."""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import Program, epochs_in_turn, save, table

from dae import cli
from dae.config import RunConfig
from dae.errors import UsageError, lookup

SIZES = {
    "images": (10**3, 10**4, 10**5, 10**6),
    "side": (28, 56, 112, 224, 512),
    "channels": (1, 3),
    "width": (1, 2, 4, 8),
    "batch_size": (16, 64, 256, 1024, 4096),
    "epochs": tuple(range(300, 3001, 300)),
    "workers": (1, 2, 4),
}
STEPS, BATCH = 25, 256  # of an epoch of `workers`
# A size, the seconds of an epoch, the peak megabytes, and how many seconds the first epoch takes longer.
Cost = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class GrowthArguments:
    """Measure the time per epoch and the peak memory of training on random images, for growing sizes of one kind.

    Each size is measured in a separate process. Times are medians, in seconds of processor time, which other work on
    the machine hardly changes; for `workers`, which divide the same images and cores, they are seconds that pass. A
    model of up to 64 workers, each on a machine like this one, is printed too.
    """

    axes: tuple[str, ...] = tuple(SIZES)
    """Axes to measure: images, side, channels (of the images), width, batch_size, epochs and workers."""
    points: int | None = None
    """Measure only the first N sizes of each; None: all."""
    model: str = "conv"
    """Network, as in run.py."""
    output: str = "runs/growth"
    """Folder of growth.json and growth.png."""


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return p of costs of the form a + b (size - first size)^p, by least squares of the last three.

    If the last does not exceed the first by a tenth, it is the slope between these two on logarithmic scales, which is
    nearly 0 if costs are constant.
    """
    pairs = np.array([sizes, costs], float).T
    grown = (pairs - pairs[0])[pairs[:, 1] > pairs[0, 1]][-3:]
    x, y = np.log(grown if len(grown) > 1 and costs[-1] > 1.1 * costs[0] else pairs[[0, -1]]).T
    return float(np.polyfit(x, y, 1)[0])


def costs_of(axis: str, sizes: Sequence[int], model: str) -> list[Cost]:
    """Return the cost of each size of an axis. For `epochs`, a single run is measured, up to each number of epochs."""
    costs: list[Cost] = []
    for size in sizes[:1] if axis == "epochs" else sizes:
        shapes = {"images": (size, 12, 12, 1), "side": (64, size, size, 1), "epochs": (64, 12, 12, 1)}
        count, *shape = shapes.get(axis, (4096, 28, 28, size if axis == "channels" else 1))
        changes: dict[str, dict[str, Any]] = {
            "side": {"batch_size": 16},
            "width": {"width": size},
            "batch_size": {"batch_size": size},
        }
        ends, rounds = (sizes, size) if axis == "epochs" else ([size], 3)
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            random = np.random.default_rng(0)
            train, test = (random.integers(0, 256, (number, *shape), np.uint8) for number in (count + 64, 16))
            np.savez(file.name, x_train=train, x_test=test)
            config = RunConfig(data=file.name, validation_examples=64, model=model, epochs=10**4)
            with Program("dae", dataclasses.replace(config, **changes.get(axis, {}))) as program:
                first = program.epoch()["processor"]
                for end in ends:
                    epochs = [program.epoch() for _ in range(rounds)]
                    seconds = statistics.median(epoch["processor"] for epoch in epochs)
                    costs.append((end, seconds, epochs[-1]["megabytes"], first - seconds))
    return costs


def costs_of_workers(sizes: Sequence[int], model: str) -> list[Cost]:
    """Return the cost of an epoch with each number of workers; print that of a step, and the model."""
    config = RunConfig(model=model, shards=4, intra_op_threads=1, batch_size=BATCH, train_examples=BATCH * STEPS)
    config = dataclasses.replace(config, epochs=10**4)  # more than are timed
    programs = {str(workers): Program("several workers", config, workers) for workers in sizes}
    programs |= {"pipeline": Program("pipeline", config), "messages": Program("messages", RunConfig(), workers=2)}
    reports = epochs_in_turn(programs, rounds=3)
    times = np.median([report["messages"] for report in reports.pop("messages")], axis=0)
    steps = {name: statistics.median(epoch["seconds"] for epoch in found) / STEPS for name, found in reports.items()}
    sent = reports["1"][0]["bytes"]
    message = float(np.interp(sent, *times.T))
    print(f"messages: {', '.join(f'{size / 1e3:,.0f} kB in {1e3 * time:.2f} ms' for size, time in times)}")
    print(f"of {model}: {sent / 1e3:,.1f} kB; its batches of {BATCH} images: {1e3 * steps['pipeline']:.2f} ms each\n")
    rows = []
    for workers in (1, 2, 4, 8, 16, 32, 64):
        # Each of n workers in a ring passes n - 1 messages on, and makes whole batches, of all workers' images.
        communication = (workers - 1) * message
        apart = max(steps["1"], workers * steps["pipeline"]) + communication
        here = f"{1e3 * steps[str(workers)]:.1f}" if workers in sizes else ""
        row = [str(workers), here, f"{1e3 * (steps['1'] + communication):.1f}", f"{1e3 * apart:.1f}"]
        rows.append([*row, f"{BATCH * workers / apart:,.0f}"])
    columns = ["workers", "ms per step", "by the model", f"{BATCH} images and a machine for each", "images/s"]
    print(table(columns, rows), end="\n\n")
    return [(n, STEPS * steps[str(n)], reports[str(n)][-1]["megabytes"], 0.0) for n in sizes]


def draw(path: Path, costs: Mapping[str, Sequence[Cost]]) -> None:
    """Write a PNG with a panel for each axis: seconds per epoch, blue, and peak megabytes, with both exponents."""
    from dae.reporting import plots

    figure, panels = plots.panels(len(costs), 4, (3, 2.4))
    for panel, (name, points) in zip(panels, costs.items(), strict=True):
        sizes, *curves, _ = zip(*points, strict=True)
        for axis, values, color in zip((panel, panel.twinx()), curves, ("#0072b2", "#d55e00"), strict=True):
            axis.loglog(sizes, values, color=color, marker=".")
            low, high = min(values), max(values)
            ticks = [low, high] if high > 1.3 * low else [high]
            axis.set(xticks=[sizes[0], sizes[-1]], ylim=(low / 2, 2 * high))
            axis.set_xticklabels([f"{sizes[0]:,}", f"{sizes[-1]:,}"])
            axis.set_yticks(ticks, [f"{tick:.3g}" if tick < 100 else f"{tick:,.0f}" for tick in ticks], color=color)
            axis.minorticks_off()
        powers = " and ".join(f"{exponent(sizes, values):.2f}" for values in curves)
        panel.set_title(f"{name}: {powers}", fontsize="medium")
    plots.save(path, figure)


def main() -> None:
    arguments = cli.parse(GrowthArguments)
    if arguments.points is not None and arguments.points < 2:
        raise UsageError(f"--points: expected an integer >= 2, got {arguments.points}")
    sizes = {axis: lookup(SIZES, axis, "--axes")[: arguments.points] for axis in arguments.axes}
    costs, rows = {}, []
    for axis, chosen in sizes.items():
        measure = costs_of_workers if axis == "workers" else functools.partial(costs_of, axis)
        costs[axis] = measure(chosen, arguments.model)
        size, seconds, megabytes, start = zip(*costs[axis], strict=True)
        row = [axis, f"{size[0]:,} to {size[-1]:,}"]
        for values in (seconds, megabytes):
            first, last = (f"{value:,.0f}" if value > 100 else f"{value:.3g}" for value in (values[0], values[-1]))
            row += [f"{first} to {last}", f"{exponent(size, values):.2f}"]
        rows.append([*row, "" if axis == "workers" else f"{start[0]:.1f} to {start[-1]:.1f}"])
    print(table(["axis", "sizes", "s per epoch", "exponent", "peak MB", "exponent", "s more in the first epoch"], rows))
    save(Path(arguments.output) / "growth.json", arguments, {"costs": costs})
    draw(Path(arguments.output) / "growth.png", costs)


if __name__ == "__main__":
    cli.run(main)
