"""Times how soon `fit`, the default run and preset `fast` are equally good: python experiments/time_to_quality.py."""

import contextlib
import dataclasses
import json
from itertools import accumulate
from pathlib import Path

from benchmark import ENTRIES as CONTENDERS
from benchmark import Process, about
from tqdm import tqdm

from dae import cli
from dae.config import PRESETS
from dae.errors import UsageError, choose

# What each trains.
ENTRIES = {"fit": PRESETS["default"], "default": PRESETS["default"], "fast": PRESETS["fast"]}


@dataclasses.dataclass(frozen=True)
class TimeToQualityArguments:
    """Train all three in one run, epoch by epoch in turns, to the validation BCE with which the default run ends."""

    output: str = "runs/time_to_quality"
    """Folder for time_to_quality.json, time_to_quality.md, time_to_quality.png, and the runs."""
    fit: str = "fit"
    """Which of benchmark.py's fits: as in the tutorial, or "fit, oneDNN on", which is faster on some processors."""
    seed: int = 0
    """Decides initial weights, order and noise."""


def race(fit: str, seed: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """{name: for each epoch the `seconds` since its training began, and its `validation_bce`}."""
    results: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, config in ENTRIES.items():
            contender = fit if name == "fit" else "dae"
            processes[name] = Process(contender, dataclasses.replace(config, seed=seed), folder=folder / name)
            stack.callback(processes[name].close)
            results[name] = [processes[name].first_epoch]
        for epoch in tqdm(range(2, max(config.epochs for config in ENTRIES.values()) + 1), disable=None):
            for name, config in ENTRIES.items():
                if epoch <= config.epochs:
                    results[name].append(processes[name].epoch())
                    if epoch == config.epochs and name != "fit":
                        processes[name].finish()
    for epochs in results.values():
        for epoch, seconds in zip(epochs, accumulate(epoch["seconds"] for epoch in epochs), strict=True):
            epoch["seconds"] = seconds
    return results


def draw(path: Path, results: dict[str, list[dict[str, float]]], target: float) -> None:
    """The curves of validation BCE over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, epochs), colour in zip(results.items(), ("#999999", "#0072b2", "#d55e00"), strict=True):
        points = [(epoch["seconds"], epoch["validation_bce"]) for epoch in epochs]
        axis.plot(*zip(*points, strict=True), label=name, color=colour)
    axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="seconds of training, with validation", ylabel="validation BCE, nats per pixel")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    arguments = cli.parse(TimeToQualityArguments)
    folder = Path(arguments.output)
    choose({name: None for name, (contender, *_) in CONTENDERS.items() if contender == "fit"}, arguments.fit, "--fit")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output: {folder} is not empty; a race begins anew, so name another")
    folder.mkdir(parents=True, exist_ok=True)
    results = race(arguments.fit, arguments.seed, folder)
    target = results["default"][-1]["validation_bce"]
    reached = {
        name: next((epoch for epoch in epochs if epoch["validation_bce"] <= target), None)
        for name, epochs in results.items()
    }
    base = reached["fit"] or results["fit"][-1]
    rows = [f"validation BCE {target:.4f}, with which the default run ends, seed {arguments.seed}:\n"]
    rows += ["| who | epochs | seconds | times fit | at the end |", "| --- | --- | --- | --- | --- |"]
    for name, epochs in results.items():
        end, epoch = f"{epochs[-1]['validation_bce']:.4f} after {len(epochs)} epochs", reached[name]
        if epoch is None:
            rows.append(f"| {name} | not reached | more than {epochs[-1]['seconds']:.0f} | | {end} |")
        else:
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
