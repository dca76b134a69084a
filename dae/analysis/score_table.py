"""A score table of denoisers on the same noisy test images, as Markdown, CSV and a picture.

Rows are the noisy images themselves, filters and the posterior mean (dae/analysis/classical.py), trained runs, one row
for all seeds, and model files.
"""

import csv
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from dae import config as config_module
from dae import plugins
from dae.analysis import classical
from dae.analysis.classical import Denoise
from dae.analysis.noise_sweep import BASELINE, TITLES, Denoiser, format_level, sweep
from dae.analysis.statistics import LEVEL, Estimate, estimate
from dae.config import PLUGIN_FIELDS, RECORDED, RunConfig, RuntimeConfig, flag
from dae.data import datasets
from dae.data.datasets import Splits
from dae.data.pipeline import evaluation_batches
from dae.errors import Interrupted, RunError, UsageError
from dae.evaluation.evaluate import check_fits, make_evaluator
from dae.evaluation.metrics import METRICS
from dae.losses.ssim import SIGMA, WINDOW
from dae.reporting import plots
from dae.runtime import cores
from dae.training.signals import deferred_signals
from dae.workdir import workdir
from dae.workdir.environment import environment
from dae.workdir.files import atomic_path, atomic_write
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_environment, read_metrics, read_report

# Metrics of the table, in the order of its columns.
COLUMNS = ("psnr", "ssim", "mse", "bce", "bce_excess")
# Images per call of a denoiser that is timed, and most calls that are timed.
TIMED_BATCH, TIMED_BATCHES = 500, 10
# Digits in the picture.
SHOWN = 10
NO_DENOISING, POSTERIOR_MEAN = "no denoising", "posterior mean"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    images: int
    """How many test images, from the first on, the metrics are means over."""
    metrics: dict[str, list[float]]
    """By metric of COLUMNS: one value per seed, or one."""
    shown: np.ndarray
    """The first SHOWN test images, denoised."""
    milliseconds: float | None = None
    """Per image."""
    weights: int | None = None
    """How many numbers a network consists of."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of training, one value per seed."""
    details: str = ""

    def estimate(self, metric: str) -> Estimate:
        """Return the mean of a metric over seeds, with its interval."""
        return estimate(self.metrics[metric])


@dataclasses.dataclass(frozen=True)
class LevelResult:
    """The PSNR, in dB, of one denoiser at one noise level."""

    denoiser: str
    level: float
    images: int
    psnr: Estimate
    details: str = ""


def noisy_and_clean(
    images: np.ndarray, config: RunConfig, purpose: str, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `count` of `images`, uint8 [N, H, W, C], with the noise that evaluation gives them, and clean.

    Both are float32 [count, H, W, C].
    """
    count = len(images) if count is None else count
    noisy, clean = [], []
    for batch in evaluation_batches(images, config, purpose):
        noisy.append(batch.noisy.numpy())
        clean.append(batch.clean.numpy())
        if sum(map(len, clean)) >= count:  # of whole batches, because the noise depends on their size
            break
    return np.concatenate(noisy)[:count], np.concatenate(clean)[:count]


def mean_metrics(clean: np.ndarray, denoised: np.ndarray) -> dict[str, list[float]]:
    """Return the mean of each metric of COLUMNS over images, float32 [N, H, W, C], as a list of one value."""
    sums = dict.fromkeys(COLUMNS, 0.0)
    for start in range(0, len(clean), TIMED_BATCH):
        pair = [tf.constant(images[start : start + TIMED_BATCH], tf.float32) for images in (clean, denoised)]
        for name in COLUMNS:
            sums[name] += float(tf.reduce_sum(tf.cast(METRICS[name](*pair), tf.float64)))
    return {name: [total / len(clean)] for name, total in sums.items()}


def in_batches(denoise: Denoise, noisy: np.ndarray) -> tuple[np.ndarray, float]:
    """Denoise images in batches of TIMED_BATCH, after one for warm-up.

    Returns the denoised images, and the median of the milliseconds per image.
    """
    denoise(noisy[:TIMED_BATCH])
    denoised, milliseconds = [], []
    for start in range(0, len(noisy), TIMED_BATCH):
        batch = noisy[start : start + TIMED_BATCH]
        started = time.perf_counter()
        denoised.append(denoise(batch))
        milliseconds.append(1000 * (time.perf_counter() - started) / len(batch))
    return np.concatenate(denoised), float(np.median(milliseconds))


def noisy_row(config: RunConfig, images: np.ndarray) -> Row:
    """Return the row of the noisy test images themselves."""
    noisy, clean = noisy_and_clean(images, config, "test")
    return Row(NO_DENOISING, len(clean), mean_metrics(clean, noisy), noisy[:SHOWN])


def tune(name: str, config: RunConfig, images: np.ndarray, count: int, executor: Executor) -> classical.Tuned:
    """Tune one of classical.METHODS on the first `count` validation images with the noise of `config`."""
    noisy, clean = noisy_and_clean(images, config, "validation", count)
    return classical.tune(executor, name, config.noise_range[0], noisy, clean)


def filter_row(tuned: classical.Tuned, config: RunConfig, images: np.ndarray, count: int, executor: Executor) -> Row:
    """Return the row of a filter, on the first `count` test images."""
    noisy, clean = noisy_and_clean(images, config, "test", count)
    denoised, milliseconds = classical.denoise(executor, tuned, noisy)
    metrics = mean_metrics(clean, denoised)
    return Row(tuned.name, count, metrics, denoised[:SHOWN], milliseconds, details=str(tuned))


def posterior_row(config: RunConfig, data: Splits, count: int) -> Row:
    """Return the row of the posterior mean given the training images, on the first `count` test images."""
    noisy, clean = noisy_and_clean(data.test, config, "test", count)
    denoised, milliseconds = in_batches(classical.posterior_mean(data.train, config.noise_range[0]), noisy)
    details = f"mean of the {len(data.train):,} training images, each weighted by its likelihood"
    return Row(POSTERIOR_MEAN, count, mean_metrics(clean, denoised), denoised[:SHOWN], milliseconds, details=details)


def train_in_process(script: Path, folder: Path, arguments: Iterable[str]) -> None:
    """Train the run in `folder` by run.py, at the path `script`, in another process; resume it if it was started.

    SIGINT and SIGTERM are passed on to it, so that it saves its state. Raises RunError if it fails.
    """
    command = [sys.executable, str(script), *arguments, "--resume", "--run-dir", str(folder), "--quiet"]
    # In a new session, so that the terminal does not send it SIGINT as well, which would be its second.
    with deferred_signals() as pending, subprocess.Popen(command, start_new_session=True) as process:
        passed_on = False
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if pending and not passed_on:
                    process.send_signal(pending[0])
                    passed_on = True
        if pending:
            raise Interrupted(pending[0], f"stopped while training {folder}; repeat the command to continue")
    if process.returncode != 0:
        raise RunError(f"{folder}: run.py stopped with exit status {process.returncode}")


def check_run(folder: Path, config: RunConfig) -> None:
    """Raise UsageError if the run in `folder` has other settings than `config`, or is in use; it need not exist."""
    with workdir.opened(folder, config_module.canonicalize(config), resume=True):
        pass


def make_folder(path: Path) -> None:
    """Create the folder unless it exists. Raises UsageError if that is impossible, or if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"--output: {path} cannot be written ({error.strerror})") from None


def check_test_images(folder: Path, config: RunConfig) -> None:
    """Raise UsageError if the run in `folder` is not finished, or was made with other images than those of `config`."""
    read_report(folder)
    trained = config_module.read(folder / workdir.CONFIG)
    if (trained.dataset, trained.data) != (config.dataset, config.data):
        images = trained.data or trained.dataset
        raise UsageError(f"--runs: {folder} was trained on {images}; expected --dataset {config.dataset}")


def group_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group finished runs by configurations that differ in the seed, or settings of the machine, alone.

    Of runs with the same seed, a group has only the first. Its name is that of its first folder, or of the folder that
    holds it if its own name is seed-N.
    """
    groups: dict[str, dict[int, Path]] = {}
    for folder in folders:
        config = config_module.read(folder / workdir.CONFIG)
        groups.setdefault(_settings(config), {}).setdefault(config.seed, folder)
    runs = [list(group.values()) for group in groups.values()]
    first = [group[0].resolve() for group in runs]
    names = [path.parent.name if re.fullmatch(r"seed-\d+", path.name) else path.name for path in first]
    return dict(zip(plugins.unique_names(names), runs, strict=True))


def _settings(config: RunConfig) -> str:
    """Return the settings that are equal for the runs of a group, as text."""
    machine = {field.name for field in dataclasses.fields(RuntimeConfig)}
    values = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in machine | {"checkpoint_every"}
    }
    for name in PLUGIN_FIELDS:  # a run has its own copies of users' files
        values[name] = config_module.map_texts(values[name], plugins.without_paths)
    return json.dumps(values)


def run_row(name: str, folders: Sequence[Path], config: RunConfig, images: np.ndarray) -> Row:
    """Return the row of finished runs that differ only in their seeds.

    Each is measured on the test images with the noise of `config`, drawn with the run's own seed.
    """
    configs = [config_module.read(folder / workdir.CONFIG) for folder in folders]
    metrics: dict[str, list[float]] = {metric: [] for metric in COLUMNS}
    for folder, trained in zip(folders, configs, strict=True):
        means = _evaluate(load_model(folder), dataclasses.replace(config, seed=trained.seed), images)
        for metric in COLUMNS:
            metrics[metric].append(means[metric])
    seconds = [sum(line["seconds"] for line in read_metrics(folder)) for folder in folders]
    row = _network_row(name, load_model(folders[0]), metrics, config, images)
    return dataclasses.replace(row, seconds=seconds, details=_run_details(configs))


def model_row(name: str, path: Path, config: RunConfig, images: np.ndarray) -> Row:
    """Return the row of a .keras or .h5 file."""
    model = load_model(path)
    means = _evaluate(model, config, images)
    return _network_row(name, model, {metric: [means[metric]] for metric in COLUMNS}, config, images)


def _evaluate(model: keras.Model, config: RunConfig, images: np.ndarray) -> dict[str, float]:
    check_fits(model, images)
    return make_evaluator(model)(evaluation_batches(images, config, "test"))


def _network_row(
    name: str, model: keras.Model, metrics: dict[str, list[float]], config: RunConfig, images: np.ndarray
) -> Row:
    noisy, _ = noisy_and_clean(images, config, "test", TIMED_BATCH * TIMED_BATCHES)
    denoised, milliseconds = in_batches(model.predict_on_batch, noisy)
    return Row(name, len(images), metrics, denoised[:SHOWN], milliseconds, model.count_params())


def _run_details(configs: Sequence[RunConfig]) -> str:
    """Return the number of training images, the seeds and the flags of runs that differ only in their seeds."""
    first, defaults = configs[0], dataclasses.asdict(RunConfig())
    # Recorded settings are filled in when a run starts, so they differ from the defaults in every run.
    hidden = {"seed", "checkpoint_every", "metrics", *RECORDED}
    flags = [
        f"`{flag(name)} {_format_setting(value)}`"
        for name, value in dataclasses.asdict(first).items()
        if name not in hidden and value != defaults[name]
    ]
    seeds = f"seed{'s' if len(configs) > 1 else ''} {', '.join(str(config.seed) for config in configs)}"
    return f"{len(datasets.load(first).train):,} training images; {seeds}; {' '.join(flags) or 'default settings'}"


def _format_setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return plugins.label(value) if isinstance(value, str) else str(value)


def level_results(
    config: RunConfig,
    data: Splits,
    levels: Sequence[float],
    method: str | None,
    groups: Mapping[str, Sequence[Path]],
    tune_examples: int,
    test_examples: int,
    executor: Executor,
) -> Iterator[LevelResult]:
    """Yield the PSNR at each noise level of the noisy test images and of several denoisers.

    These are the filter `method`, tuned anew at each level, the posterior mean, and runs, by name and with one folder
    per seed, each with its own seed. The first two are measured on the first `test_examples` test images.
    """
    for level in levels:
        at_level = dataclasses.replace(config, noise_level=level)
        noisy, clean = noisy_and_clean(data.test, at_level, "test")
        yield _level_result(NO_DENOISING, level, noisy, clean)
        noisy, clean = noisy[:test_examples], clean[:test_examples]
        if method is not None:
            tuned = tune(method, at_level, data.validation, tune_examples, executor)
            denoised, _ = classical.denoise(executor, tuned, noisy)
            yield dataclasses.replace(_level_result(method, level, denoised, clean), details=str(tuned))
        denoised, _ = in_batches(classical.posterior_mean(data.train, level), noisy)
        yield _level_result(POSTERIOR_MEAN, level, denoised, clean)
    for name, folders in groups.items():
        denoisers = []
        for folder in folders:
            seed = config_module.read(folder / workdir.CONFIG).seed
            at_seed = dataclasses.replace(config, seed=seed)
            denoisers.append(Denoiser(str(folder), load_model(folder), at_seed, data.test))
        results = [one for one in sweep(denoisers, (config.noise,), levels) if one.denoiser != BASELINE]
        for level in levels:
            psnr = [result.metrics["psnr"] for result in results if result.level == level]
            yield LevelResult(name, level, len(data.test), estimate(psnr))


def _level_result(name: str, level: float, denoised: np.ndarray, clean: np.ndarray) -> LevelResult:
    return LevelResult(name, level, len(clean), estimate([classical.mean_psnr(clean, denoised)]))


def trained_on_a_range(folders: Sequence[Path], config: RunConfig) -> bool:
    """Return whether runs of one group were trained on a range of levels of the noise model of `config`."""
    trained = config_module.read(folders[0] / workdir.CONFIG)
    return trained.noise == config.noise and trained.noise_range[0] < trained.noise_range[1]


def save(
    folder: Path,
    rows: Sequence[Row],
    config: RunConfig,
    data: Splits,
    runs: Sequence[Path],
    tuned_on: int,
    levels: Sequence[LevelResult] = (),
) -> str:
    """Write score_table.md, .csv and .png and, with `levels`, noise_levels.csv and .png; return the Markdown.

    Rows are sorted by PSNR, the best last. `runs` are the folders of all trained runs, and `tuned_on` is how many
    validation images the filters were tuned on, or 0 if there are none.
    """
    rows = sorted(rows, key=lambda row: row.estimate("psnr").mean)
    text = _markdown(rows, config, data, runs, tuned_on, levels)
    atomic_write(folder / "score_table.md", text)
    _write_csv(folder / "score_table.csv", [_csv_row(row) for row in rows])
    _, clean = noisy_and_clean(data.test, config, "test", SHOWN)
    first = next(row for row in rows if row.name == NO_DENOISING)
    pictures = {f"noisy\n{first.estimate('psnr').mean:.2f} dB": first.shown, "clean": clean}
    pictures |= {
        f"{row.name}\n{row.estimate('psnr').mean:.2f} dB": row.shown for row in rows if row.name != NO_DENOISING
    }
    plots.save_grid(folder / "score_table.png", pictures)
    if levels:
        common = [{"denoiser": one.denoiser, "level": one.level, "test_images": one.images} for one in levels]
        psnr = [_csv_values("psnr", one.psnr) | {"details": one.details} for one in levels]
        _write_csv(folder / "noise_levels.csv", [a | b for a, b in zip(common, psnr, strict=True)])
        _draw_levels(folder / "noise_levels.png", levels)
    return text


def _csv_row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"denoiser": row.name, "test_images": row.images, "seeds": len(row.metrics[COLUMNS[0]])}
    for metric in COLUMNS:
        values |= _csv_values(metric, row.estimate(metric))
    return values | {
        "weights": row.weights,
        "seconds_to_train": float(np.mean(row.seconds)) if row.seconds else None,
        "milliseconds_per_image": row.milliseconds,
        "details": row.details.replace("`", ""),
    }


def _csv_values(name: str, one: Estimate) -> dict[str, float | None]:
    values = {name: one.mean, f"{name}_low": one.low, f"{name}_high": one.high}
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _markdown(
    rows: Sequence[Row],
    config: RunConfig,
    data: Splits,
    runs: Sequence[Path],
    tuned_on: int,
    levels: Sequence[LevelResult],
) -> str:
    level = f"Gaussian noise of standard deviation {format_level(config.noise_level)}, clipped to [0, 1]"
    lines = [f"# Denoising {config.dataset}: {level}", ""]
    head = ["denoiser", "test images", *(TITLES[metric] for metric in COLUMNS), "weights", "s to train", "ms per image"]
    lines += _table(head, map(_cells, rows))
    lines += [*(f"- {row.name}: {row.details}." for row in rows if row.details), ""]
    lines += ["## Protocol", "", *(f"- {line}" for line in _protocol(config, data, runs, tuned_on)), ""]
    if levels:
        networks = {row.name for row in rows if row.weights is not None}
        lines += ["## Noise levels", "", *_levels_markdown(levels, networks)]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        f"{row.images:,}",
        *(_cell(row.estimate(metric), ".2f" if metric == "psnr" else ".4f") for metric in COLUMNS),
        "" if row.weights is None else f"{row.weights:,}",
        f"{np.mean(row.seconds):.0f}" if row.seconds else "",
        "" if row.milliseconds is None else f"{row.milliseconds:.3g}",
    ]


def _cell(one: Estimate, form: str) -> str:
    if math.isnan(one.mean):
        return ""
    return f"{one.mean:{form}}" + ("" if math.isnan(one.low) else f" [{one.low:{form}}, {one.high:{form}}]")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _protocol(config: RunConfig, data: Splits, runs: Sequence[Path], tuned_on: int) -> list[str]:
    """Return, one per line, the rules by which the table was made."""
    machine = environment()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores()
    machines = {(each["cpu"], each["cpu_cores"]) for each in map(read_environment, runs)}
    trained_on = "; ".join(f"{cpu}, {count} core{'s' if count > 1 else ''}" for cpu, count in sorted(machines))
    versions = machine["versions"] | {name: version(name) for name in ("scipy", "scikit-image", "PyWavelets", "bm3d")}
    filters = [
        f"Filters were tuned for the best mean PSNR on {tuned_on:,} validation images. They assume noise of mean 0, "
        "but clipped noise brightens black and darkens white. So the output of each is multiplied by a gain and added "
        "to an offset, fitted to the same images by least squares, and clipped to [0, 1]."
    ]
    height, width, channels = data.image_shape
    return [
        f"Images: {config.dataset}, {height} x {width} x {channels}, from 0 (black) to 1 (white): "
        f"{len(data.train):,} to train on, unless noted, the last {len(data.validation):,} training images to validate "
        f"on, and {len(data.test):,} to test on.",
        f"Noise: clip(x + {format_level(config.noise_level)} n, 0, 1), n standard normal and independent for each "
        "value. Every row has the same noise, that of seed 0, except that the noise of a run is that of its seed.",
        "Metrics are computed for each test image and then averaged, without rounding to 256 levels. PSNR is -10 "
        f"log10(MSE); SSIM has a Gaussian window of {WINDOW} x {WINDOW} pixels, sigma {SIGMA}, within the image, and "
        "constants 0.01^2 and 0.03^2; BCE clips outputs to [1e-7, 1 - 1e-7], and its excess is that above its lowest "
        "possible value.",
        f"Several seeds: the mean and, in brackets, its {LEVEL:.0%} t-interval; of seconds, the mean.",
        "No test image was used to choose anything. A run keeps the epoch with the lowest validation loss, if it has "
        "validation images.",
        *(filters if tuned_on else []),
        f"Milliseconds per image: {machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}; filters take one "
        f"image at a time, the others {TIMED_BATCH}; the median, after one batch for warm-up.",
        *([f"Seconds to train, with validation and checkpoints: {trained_on}."] if runs else []),
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}.",
    ]


def _levels_markdown(levels: Sequence[LevelResult], networks: Set[str]) -> list[str]:
    columns = list(dict.fromkeys(one.level for one in levels))
    names = list(dict.fromkeys(one.denoiser for one in levels))
    images = {one.denoiser: one.images for one in levels}
    by_cell = {(one.denoiser, one.level): _cell(one.psnr, ".2f") for one in levels}
    rows = [[name, f"{images[name]:,}", *(by_cell[name, level] for level in columns)] for name in names]
    head = ["PSNR, dB, at level", "test images", *map(format_level, columns)]
    trained = "each run is one network for all levels" if networks & set(names) else "no run was trained for a range"
    return [
        "The filter that is best on validation images was tuned anew at each level, and the posterior mean knows the "
        f"level; {trained}.",
        "",
        *_table(head, rows),
    ]


def _draw_levels(path: Path, levels: Sequence[LevelResult]) -> None:
    """Write a PNG of PSNR over the noise level, a curve for each denoiser, with its interval shaded."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(dict.fromkeys(one.denoiser for one in levels)):
        own = [one for one in levels if one.denoiser == name]
        places, colour = [one.level for one in own], "#999999" if name == NO_DENOISING else f"C{number}"
        axis.plot(places, [one.psnr.mean for one in own], ".-", color=colour, label=name)
        axis.fill_between(
            places, [one.psnr.low for one in own], [one.psnr.high for one in own], color=colour, alpha=0.2
        )
    axis.set(xlabel="standard deviation of the noise, before clipping", ylabel=TITLES["psnr"])
    axis.legend()
    axis.grid(alpha=0.3)
    plots.save(path, figure)
