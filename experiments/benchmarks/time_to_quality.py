"""Time to equal quality of Keras's `fit` and of presets: `python experiments/benchmarks/time_to_quality.py`."""

import contextlib
import dataclasses
import json
import math
from itertools import accumulate
from pathlib import Path

from benchmark import ENTRIES as FRAMEWORKS
from benchmark import Process, about
from tqdm import tqdm

from dae import cli
from dae.config import PRESETS
from dae.errors import UsageError, lookup


@dataclasses.dataclass(frozen=True)
class TimeToQualityArguments:
    """Train `fit` and presets in turn, epoch by epoch, and report when each reaches the same validation BCE."""

    output: str = "runs/time_to_quality"
    """Folder of time_to_quality.json, .md and .png, and of the runs."""
    presets: tuple[str, ...] = ("default", "fast", "good", "best")
    """Presets to train, each for its own number of epochs, but default for --epochs."""
    target: float | None = None
    """The validation BCE to reach, without training `fit` (default: the final one of the default run)."""
    fit: str = "fit"
    """Which `fit` of benchmark.py: as in the tutorial, or "fit, oneDNN on", which is faster on some processors."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    train_examples: int | None = None
    """Train on the first N images only (default: all)."""
    epochs: int = 50
    """Epochs of `fit` and of the default run."""


def race(arguments: TimeToQualityArguments, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return, for each name and epoch, the `seconds` since the start of its training, and its `validation_bce`."""
    default = dataclasses.replace(PRESETS["default"], epochs=arguments.epochs)
    configs = {"fit": default} if arguments.target is None else {}
    configs |= {name: default if name == "default" else PRESETS[name] for name in arguments.presets}
    for name, config in configs.items():
        images = arguments.train_examples or config.train_examples
        configs[name] = dataclasses.replace(config, seed=arguments.seed, train_examples=images)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, config in configs.items():
            processes[name] = Process(arguments.fit if name == "fit" else "dae", config, folder=folder / name)
            stack.callback(processes[name].close)
        for epoch in tqdm(range(1, max(config.epochs for config in configs.values()) + 1), disable=None):
            for name, config in configs.items():
                if epoch <= config.epochs:
                    results[name].append(processes[name].first_epoch if epoch == 1 else processes[name].epoch())
                if epoch == config.epochs and name != "fit":
                    processes[name].finish()
    for epochs in results.values():
        for epoch, seconds in zip(epochs, accumulate(epoch["seconds"] for epoch in epochs), strict=True):
            epoch["seconds"] = seconds
    return results


def draw(path: Path, results: dict[str, list[dict[str, float]]], target: float) -> None:
    """Plot validation BCE over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, epochs in results.items():
        points = [(epoch["seconds"], epoch["validation_bce"]) for epoch in epochs]
        axis.plot(*zip(*points, strict=True), label=name, marker=".", color="#999999" if name == "fit" else None)
    axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="seconds of training, with validation", ylabel="validation BCE, nats per pixel")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    arguments = cli.parse(TimeToQualityArguments)
    folder = Path(arguments.output)
    lookup({name: None for name, (program, *_) in FRAMEWORKS.items() if program == "fit"}, arguments.fit, "--fit")
    for name in arguments.presets:
        if lookup(PRESETS, name, "--presets").validation_examples == 0:
            raise UsageError(f"--presets: {name} has no validation images, so it cannot be compared")
    if not arguments.presets:
        raise UsageError("--presets: expected at least one name")
    if arguments.target is None and "default" not in arguments.presets:
        raise UsageError("--presets: needs default, whose result is the target, unless --target is given")
    if arguments.target is not None and not 0 < arguments.target < math.inf:
        raise UsageError(f"--target: expected a finite number > 0, got {arguments.target}")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output: {folder} is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    results = race(arguments, folder)
    target = arguments.target or results["default"][-1]["validation_bce"]
    reached = {
        name: next((epoch for epoch in epochs if epoch["validation_bce"] <= target), None)
        for name, epochs in results.items()
    }
    base = (reached["fit"] or results["fit"][-1]) if "fit" in results else None
    meaning = "Validation BCE to reach" if arguments.target else "Final validation BCE of the default run"
    rows = [f"{meaning}, seed {arguments.seed}: {target:.4f}\n"]
    rows += ["| run | epochs | seconds | times faster than fit | at the end |", "| --- | --- | --- | --- | --- |"]
    for name, epochs in results.items():
        end, epoch = f"{epochs[-1]['validation_bce']:.4f} after {len(epochs)} epochs", reached[name]
        if epoch is None:
            rows.append(f"| {name} | not reached | more than {epochs[-1]['seconds']:.0f} | | {end} |")
        else:
            ratio = ""
            if base is not None:
                ratio = f"{'' if reached['fit'] else 'more than '}{base['seconds'] / epoch['seconds']:.1f}"
            rows.append(f"| {name} | {epochs.index(epoch) + 1} | {epoch['seconds']:.0f} | {ratio} | {end} |")
    table = "\n".join(rows) + "\n"
    print(table)
    (folder / "time_to_quality.md").write_text(table, encoding="utf-8")
    result = about(arguments) | {"target": target, "results": results}
    (folder / "time_to_quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(folder / "time_to_quality.png", results, target)


if __name__ == "__main__":
    cli.run(main)
