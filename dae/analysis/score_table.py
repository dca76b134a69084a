"""The rows of a score table: denoisers on the same noisy test images.

Rows are the noisy images themselves, filters and the posterior mean (dae/analysis/classical.py), trained runs, one row
for all seeds, and model files.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae import config as config_module
from dae import plugins
from dae.analysis import classical
from dae.analysis.classical import Denoise
from dae.analysis.noise_sweep import BASELINE, Denoiser, sweep
from dae.analysis.statistics import Estimate, estimate
from dae.config import DEFAULT_NOISE_LEVEL, PLUGIN_FIELDS, RECORDED, RunConfig, RuntimeConfig, flag
from dae.data import datasets
from dae.data.datasets import Splits
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import Interrupted, RunError, UsageError
from dae.evaluation.evaluate import check_fits, make_evaluator
from dae.evaluation.metrics import METRICS
from dae.training.signals import deferred_signals
from dae.workdir import workdir
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report

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
    images: Images, config: RunConfig, purpose: str, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `count` of `images` with the noise that evaluation gives them, and clean.

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


def noisy_row(config: RunConfig, images: Images) -> Row:
    """Return the row of the noisy test images themselves."""
    noisy, clean = noisy_and_clean(images, config, "test")
    return Row(NO_DENOISING, len(clean), mean_metrics(clean, noisy), noisy[:SHOWN])


def tune(name: str, config: RunConfig, images: Images, count: int, executor: Executor) -> classical.Tuned:
    """Tune one of classical.METHODS on the first `count` validation images with the noise of `config`."""
    noisy, clean = noisy_and_clean(images, config, "validation", count)
    return classical.tune(executor, name, config.noise_range[0], noisy, clean)


def filter_row(tuned: classical.Tuned, config: RunConfig, images: Images, count: int, executor: Executor) -> Row:
    """Return the row of a filter, on the first `count` test images."""
    noisy, clean = noisy_and_clean(images, config, "test", count)
    denoised, milliseconds = classical.denoise(executor, tuned, noisy)
    metrics = mean_metrics(clean, denoised)
    return Row(tuned.name, count, metrics, denoised[:SHOWN], milliseconds, details=str(tuned))


def posterior_row(config: RunConfig, data: Splits, count: int) -> Row:
    """Return the row of the posterior mean given the training images, on the first `count` test images."""
    noisy, clean = noisy_and_clean(data.test, config, "test", count)
    denoised, milliseconds = in_batches(classical.posterior_mean(data.train.pixels, config.noise_range[0]), noisy)
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


def run_row(name: str, folders: Sequence[Path], config: RunConfig, images: Images) -> Row:
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


def model_row(name: str, path: Path, config: RunConfig, images: Images) -> Row:
    """Return the row of a .keras or .h5 file."""
    model = load_model(path)
    means = _evaluate(model, config, images)
    return _network_row(name, model, {metric: [means[metric]] for metric in COLUMNS}, config, images)


def _evaluate(model: keras.Model, config: RunConfig, images: Images) -> dict[str, float]:
    check_fits(model, images)
    return make_evaluator(model)(evaluation_batches(images, config, "test"))


def _network_row(
    name: str, model: keras.Model, metrics: dict[str, list[float]], config: RunConfig, images: Images
) -> Row:
    noisy, _ = noisy_and_clean(images, config, "test", TIMED_BATCH * TIMED_BATCHES)
    denoised, milliseconds = in_batches(model.predict_on_batch, noisy)
    return Row(name, len(images), metrics, denoised[:SHOWN], milliseconds, model.count_params())


def _run_details(configs: Sequence[RunConfig]) -> str:
    """Return the number of training images, the seeds and the flags of runs that differ only in their seeds."""
    first, defaults = configs[0], dataclasses.asdict(RunConfig(noise_level=DEFAULT_NOISE_LEVEL))
    # Recorded settings are filled in when a run starts, so they differ from the defaults in every run.
    hidden = {"seed", "checkpoint_every", "metrics", *RECORDED} - {"noise_level"}
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
        denoised, _ = in_batches(classical.posterior_mean(data.train.pixels, level), noisy)
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
