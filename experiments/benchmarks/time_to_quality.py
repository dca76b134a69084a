"""Time to equal quality of Keras's `fit` and of presets: `python experiments/benchmarks/time_to_quality.py`."""

import contextlib
import dataclasses
from itertools import accumulate
from pathlib import Path
from typing import Any

from measure import Program, save, table
from tqdm import tqdm

from dae import cli
from dae.config import PRESETS, preset
from dae.errors import UsageError, lookup


@dataclasses.dataclass(frozen=True)
class TimeToQualityArguments:
    """Train `fit` and presets in turn, epoch by epoch, and report when each reaches the same validation BCE."""

    output: str = "runs/time_to_quality"
    """Folder of time_to_quality.json and .png, and of the runs."""
    presets: tuple[str, ...] = ("fast", "good", "best")
    """Presets to train besides the default run, each for its own number of epochs."""
    seed: int = 0
    """Seed of the initial weights, the shuffling and the noise."""
    train_examples: int | None = None
    """Train on the first N images only; None: all."""
    epochs: int = 50
    """Epochs of `fit` and of the default run."""


def race(arguments: TimeToQualityArguments, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return, for each name and epoch, the `seconds` since the start of its training, and its `validation_bce`."""
    shared: dict[str, Any] = {"seed": arguments.seed}
    if arguments.train_examples is not None:
        shared["train_examples"] = arguments.train_examples
    default = preset("default", epochs=arguments.epochs, **shared)
    configs = {"fit": default, "default": default}
    configs |= {name: preset(name, **shared) for name in arguments.presets if name != "default"}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    with contextlib.ExitStack() as stack:
        programs = {
            name: stack.enter_context(Program("fit" if name == "fit" else "dae", config, folder=folder / name))
            for name, config in configs.items()
        }
        for epoch in tqdm(range(1, max(config.epochs for config in configs.values()) + 1), disable=None):
            for name, config in configs.items():
                if epoch <= config.epochs:
                    results[name].append(programs[name].epoch())
                if epoch == config.epochs and name != "fit":
                    programs[name].finish()
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
    for name in arguments.presets:
        if lookup(PRESETS, name, "--presets").get("validation_examples") == 0:
            raise UsageError(f"--presets: {name} has no validation images, so it cannot be compared")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output: {folder} is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    results = race(arguments, folder)
    target = results["default"][-1]["validation_bce"]
    reached = {
        name: next((epoch for epoch in epochs if epoch["validation_bce"] <= target), None)
        for name, epochs in results.items()
    }
    base = (reached["fit"] or results["fit"][-1])["seconds"]
    print(f"validation BCE to reach, seed {arguments.seed}: {target:.4f}\n")
    rows = []
    for name, epochs in results.items():
        end, epoch = f"{epochs[-1]['validation_bce']:.4f} after {len(epochs)} epochs", reached[name]
        if epoch is None:
            rows.append([name, "not reached", f"more than {epochs[-1]['seconds']:.0f}", "", end])
        else:
            ratio = f"{'' if reached['fit'] else 'more than '}{base / epoch['seconds']:.1f}"
            rows.append([name, str(epochs.index(epoch) + 1), f"{epoch['seconds']:.0f}", ratio, end])
    print(table(["run", "epochs", "seconds", "times faster than fit", "at the end"], rows))
    save(folder / "time_to_quality.json", arguments, {"target": target, "results": results})
    draw(folder / "time_to_quality.png", results, target)


if __name__ == "__main__":
    cli.run(main)
