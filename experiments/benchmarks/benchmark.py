"""Time this package against Keras's `fit` and other frameworks: `python experiments/benchmarks/benchmark.py`."""

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dae import cli
from dae.config import RunConfig, canonicalize, to_json
from dae.errors import RunError, UsageError, lookup

# Name in the table -> (program of frameworks.py, environment variables, package that it needs besides those of dae).
ENTRIES: dict[str, tuple[str, dict[str, str], str | None]] = {
    "fit": ("fit", {}, None),
    "fit, oneDNN off": ("fit", {"TF_ENABLE_ONEDNN_OPTS": "0"}, None),
    "fit, oneDNN on": ("fit", {"TF_ENABLE_ONEDNN_OPTS": "1"}, None),
    "dae": ("dae_train", {}, None),
    "PyTorch eager": ("torch_eager", {}, "torch"),
    "PyTorch contiguous": ("torch_contiguous", {}, "torch"),
    "PyTorch compile": ("torch_compile", {}, "torch"),
    "JAX jit": ("jax_jit", {}, "jax"),
}
PYTORCH = ("PyTorch eager", "PyTorch contiguous", "PyTorch compile")
# Floating-point operations of one epoch of the program matrix_product.
PRODUCT_OPERATIONS = 20 * 2 * 2048**3


@dataclasses.dataclass(frozen=True)
class BenchmarkArguments:
    """Time whole epochs of training, one framework after the other in each round, each in a separate process."""

    output: str = "runs/benchmark"
    """Folder of benchmark.json, benchmark.md and benchmark.png."""
    only: tuple[str, ...] = tuple(ENTRIES)
    """Frameworks, by their names in the table; those whose package is not installed are left out."""
    rounds: int = 5
    """Timed epochs of each framework, after one for warm-up."""
    model: str = "conv"
    """Network, as for run.py."""
    train_examples: int = 55_000
    """Images per epoch; with --models, those of conv."""
    batch_size: int = 128
    """Images per step."""
    require: float | None = None
    """Exit with 1 unless dae is at least this many times as fast as fit."""
    models: bool = False
    """Instead: the speed of dae, fit and PyTorch, those in --only, with each network of the package."""
    scaling: bool = False
    """Instead: how the speed of dae and fit changes with batch size, image size, width and cores."""
    train_loop: bool = False
    """Instead: the speed of the train step alone with 1 to 40 steps per call of the train loop."""
    pipelines: bool = False
    """Instead: the speed of the input pipeline alone with each noise, relative to the train step alone."""


class Process:
    """A process that runs a program of frameworks.py and has trained its first epoch, the warm-up."""

    def __init__(self, name: str, config: RunConfig, cores: int | None = None, folder: Path | None = None) -> None:
        """Start it on `cores` cores (default: all), with `folder` for its files (default: a temporary one)."""
        program, environment, _ = ENTRIES.get(name, (name, {}, None))
        self._scratch = tempfile.TemporaryDirectory()
        folder = folder or Path(self._scratch.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        path = folder / "config.json"
        path.write_text(to_json(canonicalize(config)), encoding="utf-8")
        inherited = {key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}
        script = str(Path(__file__).with_name("frameworks.py"))
        if cores is not None:
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, allowed[:cores])  # inherited by the child
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, script, program, str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=inherited | environment,
                    text=True,
                )
        finally:
            if cores is not None:
                os.sched_setaffinity(0, allowed)
        self._name = name
        try:
            self.first_epoch = self._read()
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def epoch(self) -> dict[str, float]:
        """Let it train one epoch; return its `seconds` and what else it reports."""
        self._continue()
        return self._read()

    def finish(self) -> None:
        """Let it finish after its last epoch."""
        self._continue()
        self._process.wait()

    def peak_megabytes(self) -> float | None:
        """Return its peak resident memory, on systems that report it."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def _continue(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("continue\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text(errors="replace").strip().splitlines()
            raise RunError(f"{self._name}: stopped; last line of its log: {log[-1] if log else '(empty)'}")
        return json.loads(line)


def time_in_turn(names: list[str], config: RunConfig, rounds: int, cores: int | None = None) -> dict[str, dict]:
    """Return `seconds` of each round and `peak_megabytes` for each name; one that fails is reported and left out."""
    processes: dict[str, Process] = {}
    results: dict[str, dict] = {}
    try:
        for name in names:
            try:
                processes[name] = Process(name, config, cores)
            except RunError as error:
                tqdm.write(str(error))
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for _ in tqdm(range(rounds), unit=" rounds", disable=None):
            for name, process in processes.items():
                seconds[name].append(process.epoch()["seconds"])
        for name, process in processes.items():
            results[name] = {"seconds": seconds[name], "peak_megabytes": process.peak_megabytes()}
    finally:
        for process in processes.values():
            process.close()
    return results


def operations_per_image(model: Any) -> int:
    """Return the floating-point operations of one image's training step in the convolutions of a keras.Model.

    Forward pass, gradient of the weights and gradient of the inputs cost the same; the first layer lacks the last one.
    """
    import keras

    forward = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose):
            # The kernel is multiplied at each pixel of the output, or of the input if the convolution is transposed.
            place = layer.output if isinstance(layer, keras.layers.Conv2D) else layer.input
            forward.append(2 * math.prod(place.shape[1:3]) * math.prod(layer.kernel.shape))
    return 3 * sum(forward) - forward[0]


def build(name: str) -> Any:
    """Return the network, a keras.Model, for digits. Raises UsageError for an unknown name."""
    cli.import_tensorflow()
    from dae.models import networks

    return networks.build(RunConfig(model=name), (28, 28, 1))


def installed(names: Iterable[str]) -> list[str]:
    """Return those of the frameworks whose package is installed."""
    return [name for name in names if (package := ENTRIES[name][2]) is None or importlib.util.find_spec(package)]


def configured(arguments: BenchmarkArguments) -> RunConfig:
    """Return the configuration to time, with the epochs of the warm-up and all rounds, and one more."""
    return RunConfig(
        model=arguments.model,
        train_examples=arguments.train_examples,
        batch_size=arguments.batch_size,
        epochs=arguments.rounds + 2,
    )


def compare(arguments: BenchmarkArguments) -> None:
    """Time every framework, and write a table, a chart and JSON."""
    config = configured(arguments)
    operations = operations_per_image(build(arguments.model))
    results = time_in_turn([*installed(arguments.only), "matrix_product"], config, arguments.rounds)
    rate = PRODUCT_OPERATIONS / statistics.median(results.pop("matrix_product")["seconds"])
    limit = rate / operations
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
    head = "| framework | images/s | range | times as fast as fit | of the limit | peak MB |\n"
    head += "| --- | --- | --- | --- | --- | --- |"
    table = "\n".join([head, *rows]) + "\n"
    print(f"{table}\nmatrix products: {rate / 1e9:.0f} GFLOP/s, so the limit is {limit:,.0f} images/s")
    write(arguments, table, {"matrix_product_flops": rate, "limit_images_per_second": limit, "results": results})
    draw(Path(arguments.output) / "benchmark.png", {name: r["images_per_second"] for name, r in results.items()})
    if arguments.require is not None:
        if not {"fit", "dae"} <= set(results):
            raise RunError("--require: fit or dae failed")
        ratio = results["dae"]["ratio_to_fit"]
        if ratio < arguments.require:
            raise RunError(f"--require: expected {arguments.require} times the speed of fit, got {ratio:.2f}")


def models(arguments: BenchmarkArguments) -> None:
    """Time dae, fit and PyTorch with each network, on fewer images the more operations it takes."""
    cli.import_tensorflow()
    from dae.models.networks import MODELS

    names = installed(name for name in ("dae", "fit", *PYTORCH) if name in arguments.only)
    built = {name: build(name) for name in MODELS}
    operations = {name: operations_per_image(model) for name, model in built.items()}
    rows, results = [], {}
    for name, model in built.items():
        # Whole batches, since PyTorch compiles again for others; at least 80, so that summaries and checkpoints take
        # little of the time, as in longer epochs.
        steps = arguments.train_examples * operations["conv"] // operations[name] // arguments.batch_size
        images = min(arguments.train_examples, max(steps, 80) * arguments.batch_size)
        config = dataclasses.replace(
            configured(arguments),
            model=name,
            train_examples=images,
            validation_examples=max(1, images // 11),  # by default, too, there are eleven times as many for training
        )
        timed = time_in_turn(names, config, arguments.rounds)
        speeds = {framework: images / statistics.median(result["seconds"]) for framework, result in timed.items()}
        results[name] = {"parameters": model.count_params(), "operations_per_image": operations[name], "images": images}
        results[name] |= {"images_per_second": speeds, "seconds": {key: one["seconds"] for key, one in timed.items()}}
        pytorch, fit = max(speeds.get(key, 0) for key in PYTORCH), speeds.get("fit", 0)
        ratios = [f"{speeds['dae'] / other:.2f}" if "dae" in speeds and other else "" for other in (pytorch, fit)]
        cells = [f"{speeds[framework]:,.0f}" if framework in speeds else "" for framework in names]
        rows.append(f"| {' | '.join([name, f'{model.count_params():,}', *cells, *ratios])} |")
        tqdm.write(rows[-1])
    head = ["network", "parameters", *(f"{name}, images/s" for name in names)]
    head += ["dae relative to the fastest PyTorch", "dae relative to fit"]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows]) + "\n"
    print(table)
    write(arguments, table, {"models": results})


def scaling(arguments: BenchmarkArguments) -> None:
    """Time dae and fit with one setting changed at a time."""
    cases: list[tuple[str, int, dict, int | None]] = []
    for size in (32, 128, 512, 2048):
        cases.append(("batch size", size, {"batch_size": size, "train_examples": max(2560, 3 * size)}, None))
    for side in (28, 56, 112):
        cases.append(("side", side, {"train_examples": 1280}, None))
    for width in (1, 2, 4):
        cases.append(("width", width, {"width": width, "train_examples": 1280}, None))
    for cores in range(1, len(os.sched_getaffinity(0)) + 1):
        cases.append(("cores", cores, {"train_examples": 2560}, cores))
    settings = {"model": arguments.model, "validation_examples": 500, "epochs": arguments.rounds + 2}
    rows, results = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for what, value, changes, cores in tqdm(cases, unit=" cases", disable=None):
            if what == "side" and value != 28:
                changes = changes | {"data": write_images(Path(scratch) / f"{value}.npz", value)}
            config = RunConfig(**(settings | changes))
            timed = time_in_turn(["fit", "dae"], config, arguments.rounds, cores)
            speeds = {n: config.train_examples / statistics.median(r["seconds"]) for n, r in timed.items()}
            results.append({"what": what, "value": value, "images_per_second": speeds})
            ratio = speeds["dae"] / speeds["fit"]
            rows.append(f"| {what} {value} | {speeds['fit']:,.0f} | {speeds['dae']:,.0f} | {ratio:.2f} |")
    table = (
        "\n".join(["| case | fit images/s | dae images/s | times as fast as fit |\n| --- | --- | --- | --- |", *rows])
        + "\n"
    )
    print(table)
    write(arguments, table, {"scaling": results})


def pipelines(arguments: BenchmarkArguments) -> None:
    """Time the train step alone, and the pipeline alone with each noise at one level and at a range."""
    from dae.data.noise import NOISES

    config = configured(arguments)
    cases = {"train step": ("step_alone", config)}
    for name in NOISES:
        for level in (0.1, 0.5, (0.1, 0.8)):
            settings = dataclasses.replace(config, noise=name, noise_level=level)
            cases[f"{name} {level}"] = ("pipeline_alone", settings)
    speeds = {}
    for case, (program, settings) in tqdm(cases.items(), unit=" cases", disable=None):
        seconds = time_in_turn([program], settings, arguments.rounds)[program]["seconds"]
        speeds[case] = arguments.train_examples / statistics.median(seconds)
    rows = [f"| {case} | {speed:,.0f} | {speed / speeds['train step']:.1f} |" for case, speed in speeds.items()]
    table = "\n".join(["| alone | images/s | relative to the train step |\n| --- | --- | --- |", *rows]) + "\n"
    print(table)
    write(arguments, table, {"pipelines": speeds})


def train_loop(arguments: BenchmarkArguments) -> None:
    """Time the train step alone, with several numbers of steps per call, relative to the 20 that the package takes."""
    config = configured(arguments)
    names = [f"{steps} steps per call" for steps in (1, 5, 10, 20, 40)]
    seconds = {name: result["seconds"] for name, result in time_in_turn(names, config, arguments.rounds).items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        f"| {name} | {arguments.train_examples / median:,.0f} | {median / medians['20 steps per call']:.3f} |"
        for name, median in medians.items()
    ]
    table = "\n".join(["| train step alone | images/s | relative time |\n| --- | --- | --- |", *rows]) + "\n"
    print(table)
    write(arguments, table, {"seconds": seconds})


def write_images(path: Path, side: int) -> str:
    """Write digits, repeated to images of `side` x `side`, to an .npz file and return its path."""
    from dae.data import datasets

    images = datasets.load(RunConfig()).test.pixels[:2500, :, :, 0]
    times = -(-side // 28)
    large = np.tile(images, (1, times, times))[:, :side, :side]
    np.savez(path, x_train=large, x_test=large[:500])
    return str(path)


def about(arguments: Any) -> dict[str, Any]:
    """Return what timings depend on: date, machine, versions, command."""
    cli.import_tensorflow()
    from dae.workdir.environment import environment

    peers = {name: version(name) for name in ("torch", "jax") if importlib.util.find_spec(name)}
    return environment() | {
        "date": date.today().isoformat(),
        "arguments": dataclasses.asdict(arguments),
        "peers": peers,
    }


def write(arguments: BenchmarkArguments, table: str, results: dict) -> None:
    """Write benchmark.md and benchmark.json, with what the timings depend on."""
    folder = Path(arguments.output)
    text = json.dumps(about(arguments) | results, indent=2) + "\n"
    (folder / "benchmark.json").write_text(text, encoding="utf-8")
    (folder / "benchmark.md").write_text(table, encoding="utf-8")


def draw(path: Path, speeds: dict[str, float]) -> None:
    """Plot a bar chart of images per second."""
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
    for name in arguments.only:
        lookup(ENTRIES, name, "--only")
    if arguments.rounds < 1:
        raise UsageError(f"--rounds: expected a whole number >= 1, got {arguments.rounds}")
    if arguments.require is not None and not {"fit", "dae"} <= set(arguments.only):
        raise UsageError("--require: needs both fit and dae in --only")
    build(arguments.model)  # raises UsageError for a mistake before anything is written
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    modes = {"models": models, "scaling": scaling, "train_loop": train_loop, "pipelines": pipelines}
    next((mode for name, mode in modes.items() if getattr(arguments, name)), compare)(arguments)


if __name__ == "__main__":
    cli.run(main)
