"""Time this package against Keras's `fit` and PyTorch: `python experiments/benchmarks/benchmark.py`; see `--help`."""

import dataclasses
import statistics
from pathlib import Path

from measure import Program, epochs_in_turn, save, table
from programs import PROGRAMS

from dae import cli
from dae.data import datasets
from dae.errors import RunError, UsageError, lookup


@dataclasses.dataclass(frozen=True)
class BenchmarkArguments(cli.ConfigArguments, cli.PresetArguments):
    """Time whole epochs of training, with the programs in turn in each round, and every program in a separate process.

    `dae` trains as run.py does with the same flags. `fit` and PyTorch take from them the network, the images and the
    batch size, and always train with Adam at 1e-3 on bce and Gaussian noise of 0.5. `limit` is what the
    convolutions of a training step alone would take at the rate of large matrix products.
    """

    only: tuple[str, ...] = ("fit", "dae", "limit")
    """Programs to time: fit, dae, PyTorch, "PyTorch compile" and limit; "train step" and pipeline of dae, each alone;
    and denoise, the throughput of denoising a picture, and "network alone"."""
    checkouts: tuple[str, ...] = ()
    """Also time dae of other checkouts of this repository, before the others."""
    rounds: int = 5
    """Timed epochs of each, after one for warm-up."""
    require: float | None = None
    """Exit with 1 unless dae is at least this many times as fast as the first."""
    output: str = "runs/benchmark"
    """Folder of benchmark.json."""


def main() -> None:
    arguments = cli.parse_config(BenchmarkArguments)
    for name in arguments.only:
        lookup(PROGRAMS, name, "--only")
    if arguments.require is not None and "dae" not in arguments.only:
        raise UsageError("--require: needs dae in --only")
    config = dataclasses.replace(arguments.config, epochs=10**4)  # more than are timed
    images = len(datasets.load(config).train)
    programs = {f"dae of {folder}": Program("dae", config, checkout=folder) for folder in arguments.checkouts}
    programs |= {name: Program(name, config) for name in arguments.only}
    epochs = epochs_in_turn(programs, arguments.rounds)
    speeds = {
        name: [epoch.get("images", images) / epoch["seconds"] for epoch in reports] for name, reports in epochs.items()
    }
    first = next(iter(speeds))

    def ratio(name: str, to: str) -> float:
        """Return the median of the ratios of the rounds."""
        return statistics.median(speed / base for speed, base in zip(speeds[name], speeds[to], strict=True))

    columns = ["program", "images/s", "range", f"times as fast as {first}", "peak MB"]
    rows = [
        [
            name,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{ratio(name, first):.2f}",
            f"{epochs[name][-1]['megabytes']:,.0f}",
        ]
        for name, values in speeds.items()
    ]
    if "limit" in speeds:
        columns.append("of the limit")
        rows = [[*row, f"{ratio(row[0], 'limit'):.0%}"] for row in rows]
    print(table(columns, rows))
    save(Path(arguments.output) / "benchmark.json", arguments, {"images_per_second": speeds, "epochs": epochs})
    if arguments.require is not None and ratio("dae", first) < arguments.require:
        raise RunError(
            f"--require: expected {arguments.require} times the speed of {first}, got {ratio('dae', first):.2f}"
        )


if __name__ == "__main__":
    cli.run(main)
