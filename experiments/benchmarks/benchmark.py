"""Times this package against Keras's `fit` and others, in turns: python experiments/benchmark.py."""

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dae import cli
from dae import config as configs
from dae.config import RunConfig
from dae.errors import RunError, UsageError

# Name in the table -> (contender, environment, the package that it needs beside those of dae).
ENTRIES: dict[str, tuple[str, dict[str, str], str | None]] = {
    "fit": ("fit", {}, None),
    "fit, oneDNN off": ("fit", {"TF_ENABLE_ONEDNN_OPTS": "0"}, None),
    "fit, oneDNN on": ("fit", {"TF_ENABLE_ONEDNN_OPTS": "1"}, None),
    "dae": ("loop", {}, None),
    "PyTorch eager": ("torch_eager", {}, "torch"),
    "PyTorch compile": ("torch_compile", {}, "torch"),
    "JAX jit": ("jax_jit", {}, "jax"),
}
# Of one matrix_product round.
PRODUCT_OPERATIONS = 20 * 2 * 2048**3


@dataclasses.dataclass(frozen=True)
class BenchmarkArguments:
    """Time whole epochs of training, contender after contender, round after round, each in a process of its own."""

    output: str = "runs/benchmark"
    """Folder for benchmark.json, benchmark.md and benchmark.png."""
    only: tuple[str, ...] = tuple(ENTRIES)
    """Contenders, by their names in the table; those whose package is not installed are left out."""
    rounds: int = 5
    """Timed epochs of each; one more goes before as warm-up."""
    train_examples: int = 55_000
    """Images in an epoch."""
    batch_size: int = 128
    """Images in a step."""
    require: float | None = None
    """Exit with 1 unless dae is at least so many times as fast as fit."""
    scaling: bool = False
    """Instead: how the cost of dae and fit grows with batch size, side of the images, width and cores."""
    pipelines: bool = False
    """Instead: the images that the pipeline alone delivers with each noise, against those that the train step takes."""


class Process:
    """A running contender that has trained its first epoch, in which it warmed up."""

    def __init__(self, name: str, config: RunConfig, cores: int | None = None, folder: Path | None = None) -> None:
        """Starts it on so many cores (default: all), with `folder` for its files (default: a temporary one)."""
        contender, environment, _ = ENTRIES.get(name, (name, {}, None))
        self._scratch = tempfile.TemporaryDirectory()
        folder = folder or Path(self._scratch.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / "said"
        path = folder / "config.json"
        path.write_text(configs.to_json(config), encoding="utf-8")
        own = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
        script = str(Path(__file__).with_name("frameworks.py"))
        if cores is not None:
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, allowed[:cores])  # the child inherits it
        try:
            with self._said.open("w") as said:
                self._process = subprocess.Popen(
                    [sys.executable, script, contender, str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env=own | environment,
                    text=True,
                )
        finally:
            if cores is not None:
                os.sched_setaffinity(0, allowed)
        self._name = name
        self.first_epoch = self._answer()

    def epoch(self) -> dict[str, float]:
        """Lets it train one epoch; its `seconds` and what else it says of it."""
        self._go_on()
        return self._answer()

    def finish(self) -> None:
        """Lets it do what comes after its last epoch."""
        self._go_on()
        self._process.wait()

    def _go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def peak_megabytes(self) -> float | None:
        """The most memory it has had resident, where the system tells."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._said.read_text(errors="replace").strip().splitlines()
            raise RunError(f"{self._name}: stopped; it said: {said[-1] if said else 'nothing'}")
        return json.loads(line)


def in_turns(names: list[str], config: RunConfig, rounds: int, cores: int | None = None) -> dict[str, dict]:
    """{name: {"seconds": of each round, "summary_share", "peak_megabytes"}}; one that cannot run is named and left out.

    The share is that of TensorBoard's summaries in the time of all epochs.
    """
    processes: dict[str, Process] = {}
    results: dict[str, dict] = {}
    try:
        for name in names:
            try:
                processes[name] = Process(name, config, cores)
            except RunError as error:
                tqdm.write(str(error))
        epochs: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        for _ in tqdm(range(rounds), unit=" rounds", disable=None):
            for name, process in processes.items():
                epochs[name].append(process.epoch())
        for name, process in processes.items():
            seconds = [epoch["seconds"] for epoch in epochs[name]]
            share = sum(epoch.get("summary_seconds", 0) for epoch in epochs[name]) / sum(seconds)
            results[name] = {"seconds": seconds, "summary_share": share, "peak_megabytes": process.peak_megabytes()}
    finally:
        for process in processes.values():
            process.close()
    return results


def operations_per_image(config: RunConfig) -> int:
    """Multiplications and additions of one image's training step in the network's convolutions.

    Forward, gradient of the weights and gradient of the inputs cost the same; the first layer needs no last one.
    """
    import keras

    from dae.models import networks

    layers = networks.build(config, (28, 28, 1)).layers
    forward = [
        2 * math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
        for layer in layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    return 3 * sum(forward) - forward[0]


def compare(arguments: BenchmarkArguments) -> None:
    """The first mode: every contender, a table, a chart, JSON."""
    config = RunConfig(
        train_examples=arguments.train_examples, batch_size=arguments.batch_size, epochs=arguments.rounds + 2
    )
    names = [
        name
        for name in arguments.only
        if (package := ENTRIES[name][2]) is None or importlib.util.find_spec(package) is not None
    ]
    results = in_turns([*names, "matrix_product"], config, arguments.rounds)
    rate = PRODUCT_OPERATIONS / statistics.median(results.pop("matrix_product")["seconds"])
    limit = rate / operations_per_image(config)
    base = statistics.median(results["fit"]["seconds"]) if "fit" in results else None
    rows = []
    for name, result in results.items():
        speeds = sorted(arguments.train_examples / seconds for seconds in result["seconds"])
        median = statistics.median(speeds)
        ratio = base / statistics.median(result["seconds"]) if base else None
        result |= {"images_per_second": median, "ratio_to_fit": ratio, "share_of_limit": median / limit}
        rows.append(
            f"| {name} | {median:,.0f} | {speeds[0]:,.0f} to {speeds[-1]:,.0f} | "
            f"{'' if ratio is None else f'{ratio:.2f}'} | {median / limit:.0%} | "
            f"{result['peak_megabytes'] or 0:,.0f} |"
        )
    head = "| contender | images/s | from .. to | times fit | of the limit | peak MB |\n"
    head += "| --- | --- | --- | --- | --- | --- |"
    table = "\n".join([head, *rows]) + "\n"
    print(f"{table}\nmatrix products: {rate / 1e9:.0f} GFLOP/s, the limit: {limit:,.0f} images/s")
    if "dae" in results:
        print(f"TensorBoard's summaries, counted in: {results['dae']['summary_share']:.1%} of dae's epochs")
    write(arguments, table, {"matrix_product_flops": rate, "limit_images_per_second": limit, "results": results})
    draw(Path(arguments.output) / "benchmark.png", {name: r["images_per_second"] for name, r in results.items()})
    if arguments.require is not None:
        if not {"fit", "dae"} <= set(results):
            raise RunError("--require: fit or dae could not run")
        ratio = results["dae"]["ratio_to_fit"]
        if ratio < arguments.require:
            raise RunError(f"dae is {ratio:.2f} times as fast as fit; --require asks for {arguments.require}")


def scaling(arguments: BenchmarkArguments) -> None:
    """The second mode: one thing changed at a time."""
    cases: list[tuple[str, int, dict, int | None]] = []
    for size in (32, 128, 512, 2048):
        cases.append(("batch size", size, {"batch_size": size, "train_examples": max(2560, 3 * size)}, None))
    for side in (28, 56, 112):
        cases.append(("side", side, {"train_examples": 1280}, None))
    for width in (1, 2, 4):
        cases.append(("width", width, {"width": width, "train_examples": 1280}, None))
    for cores in range(1, len(os.sched_getaffinity(0)) + 1):
        cases.append(("cores", cores, {"train_examples": 2560}, cores))
    rows, results = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for what, value, changes, cores in tqdm(cases, unit=" cases", disable=None):
            if what == "side" and value != 28:
                changes = changes | {"data": write_images(Path(scratch) / f"{value}.npz", value)}
            config = RunConfig(**({"validation_examples": 500, "epochs": arguments.rounds + 2} | changes))
            timed = in_turns(["fit", "dae"], config, arguments.rounds, cores)
            speeds = {n: config.train_examples / statistics.median(r["seconds"]) for n, r in timed.items()}
            results.append({"what": what, "value": value, "images_per_second": speeds})
            ratio = speeds["dae"] / speeds["fit"]
            rows.append(f"| {what} {value} | {speeds['fit']:,.0f} | {speeds['dae']:,.0f} | {ratio:.2f} |")
    table = "\n".join(["| case | fit images/s | dae images/s | times fit |\n| --- | --- | --- | --- |", *rows]) + "\n"
    print(table)
    write(arguments, table, {"scaling": results})


def pipelines(arguments: BenchmarkArguments) -> None:
    """The third mode: the pipeline alone, with each noise at one level and at a range, and the train step alone."""
    from dae.data.noise import NOISES

    config = RunConfig(
        train_examples=arguments.train_examples, batch_size=arguments.batch_size, epochs=arguments.rounds + 2
    )
    cases = {"train step": ("step_alone", config)}
    for name in NOISES:
        for level in (0.1, 0.5, (0.1, 0.8)):
            settings = dataclasses.replace(config, noise=name, noise_level=level)
            cases[f"{name} {level}"] = ("pipeline_alone", settings)
    speeds = {}
    for case, (contender, settings) in tqdm(cases.items(), unit=" cases", disable=None):
        seconds = in_turns([contender], settings, arguments.rounds)[contender]["seconds"]
        speeds[case] = arguments.train_examples / statistics.median(seconds)
    rows = [f"| {case} | {speed:,.0f} | {speed / speeds['train step']:.1f} |" for case, speed in speeds.items()]
    table = "\n".join(["| alone | images/s | times the train step |\n| --- | --- | --- |", *rows]) + "\n"
    print(table)
    write(arguments, table, {"pipelines": speeds})


def write_images(path: Path, side: int) -> str:
    """Digits repeated side by side to images of `side` x `side`, as an .npz file; its path."""
    from dae.data import datasets

    images = datasets.load(RunConfig()).test[:2500, :, :, 0]
    times = -(-side // 28)
    large = np.tile(images, (1, times, times))[:, :side, :side]
    np.savez(path, x_train=large, x_test=large[:500])
    return str(path)


def about(arguments: Any) -> dict[str, Any]:
    """What figures depend on: date, machine, versions, command."""
    cli.load_tensorflow(RunConfig())
    from dae import runtime

    peers = {name: version(name) for name in ("torch", "jax") if importlib.util.find_spec(name)}
    return runtime.environment() | {
        "date": date.today().isoformat(),
        "arguments": dataclasses.asdict(arguments),
        "peers": peers,
    }


def write(arguments: BenchmarkArguments, table: str, results: dict) -> None:
    """benchmark.md and benchmark.json, with what the figures depend on."""
    folder = Path(arguments.output)
    text = json.dumps(about(arguments) | results, indent=2) + "\n"
    (folder / "benchmark.json").write_text(text, encoding="utf-8")
    (folder / "benchmark.md").write_text(table, encoding="utf-8")


def draw(path: Path, speeds: dict[str, float]) -> None:
    """A bar chart of images per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(speeds) + 1), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        list(speeds), list(speeds.values()), color=["#0072b2" if n == "dae" else "#999999" for n in speeds]
    )
    axis.bar_label(bars, fmt="{:,.0f}", padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="images per second")
    axis.margins(x=0.15)
    figure.savefig(path)


def main() -> None:
    arguments = cli.parse(BenchmarkArguments)
    unknown = [name for name in arguments.only if name not in ENTRIES]
    if unknown:
        raise UsageError(f"--only: {unknown[0]!r} is none of {', '.join(map(repr, ENTRIES))}")
    if arguments.rounds < 1:
        raise UsageError(f"--rounds: {arguments.rounds} is not a whole number from 1 up")
    if arguments.require is not None and not {"fit", "dae"} <= set(arguments.only):
        raise UsageError("--require: needs both 'fit' and 'dae' among --only")
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    (scaling if arguments.scaling else pipelines if arguments.pipelines else compare)(arguments)


if __name__ == "__main__":
    cli.run(main)
