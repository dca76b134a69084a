"""The score table: networks, filters and the posterior mean on the same noisy test images, with the protocol."""

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import tensorflow as tf

from dae import config as config_module
from dae import plugins, runtime
from dae.analysis import classical, report
from dae.analysis.denoisers import SAMPLES, Score, Trial, model_trial, rows
from dae.analysis.report import LEVEL
from dae.config import RunConfig
from dae.data import datasets, noise
from dae.data.datasets import Splits
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.files import atomic_write
from dae.losses.ssim import SIGMA, WINDOW
from dae.reporting import plots
from dae.workdir import workdir
from dae.workdir.model_files import load_model
from dae.workdir.workdir import environment, read_metrics, read_report

# Columns of the table in Markdown; the CSV file has more.
COLUMNS = ["denoiser", "test_images", "psnr", "ssim", "mse", "bce", "bce_excess"]
COLUMNS += ["weights", "seconds_to_train", "milliseconds_per_image"]
# Settings that are not part of a run's name: the runs of a table share them, or they change only last bits.
_UNNAMED = {
    "seed",
    "dataset",
    "data",
    "noisy",
    "clean",
    "checkpoint_every",
    "metrics",
    "shards",
    "intra_op_threads",
    "onednn",
}


def check_test_images(folder: Path, config: RunConfig) -> None:
    """Raise UsageError if the run in `folder` is not finished, or was made with other images than those of `config`."""
    read_report(folder)
    trained = config_module.read(folder / workdir.CONFIG)
    if (trained.dataset, trained.data, trained.clean) != (config.dataset, config.data, config.clean):
        images = trained.data or trained.clean or trained.dataset
        raise UsageError(f"--runs: {folder} was trained on {images}; expected --dataset {config.dataset}")


def group_runs(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Group finished runs that differ only in their seeds, by names that tell how to repeat them: `best --epochs 12`.

    Of runs with the same seed, a group has only the first.
    """
    groups: dict[str, dict[int, Path]] = {}
    for folder in folders:
        config = config_module.read(folder / workdir.CONFIG)
        command = config_module.shortest(config, _UNNAMED, plugins.without_paths)
        groups.setdefault(command, {}).setdefault(config.seed, folder)
    names = plugins.unique_names(re.sub("@[0-9a-f]{64}", "", command) for command in groups)
    return {name: list(group.values()) for name, group in zip(names, groups.values(), strict=True)}


def noise_level(config: RunConfig) -> float:
    """Return the noise level of the table."""
    return noise.level_range(config, is_paired=False)[0]


def run_trials(groups: Mapping[str, Sequence[Path]], config: RunConfig, images: Images) -> Iterator[Trial]:
    """Yield a trial for each run of each group, with the noise of `config`, drawn with the run's own seed."""
    for name, folders in groups.items():
        configs = [config_module.read(folder / workdir.CONFIG) for folder in folders]
        seeds = ", ".join(str(trained.seed) for trained in configs)
        seconds = (line["seconds"] for folder in folders for line in read_metrics(folder))
        facts = {
            "seconds_to_train": sum(seconds) / len(folders),
            "details": f"{len(datasets.load(configs[0]).train):,} training images; seeds: {seeds}",
        }
        for folder, trained in zip(folders, configs, strict=True):
            trial = model_trial(name, load_model(folder), dataclasses.replace(config, seed=trained.seed), images)
            yield dataclasses.replace(trial, facts={**trial.facts, **facts})


def posterior_trial(config: RunConfig, data: Splits, count: int) -> Trial:
    """Return the trial of the posterior mean given the training images, on the first `count` test images."""
    denoise = classical.posterior_mean(data.train.pixels, noise_level(config))
    details = f"mean of the {len(data.train):,} training images, each weighted by its likelihood"
    return Trial("posterior mean", denoise, data.test[:count], config, facts={"details": details})


def filter_trials(
    names: Sequence[str], config: RunConfig, data: Splits, tune_examples: int, test_examples: int, pool: Pool
) -> Iterator[Trial]:
    """Yield trials of filters, each tuned on the first validation images, on the first test images."""
    batches = list(evaluation_batches(data.validation[:tune_examples], config, "validation"))
    noisy, clean = (np.concatenate([getattr(batch, kind) for batch in batches]) for kind in ("noisy", "clean"))
    for name in names:
        tuned = classical.tune_filter(pool, name, noise_level(config), noisy, clean)

        def denoise(noisy: tf.Tensor, tuned: classical.TunedFilter = tuned) -> np.ndarray:
            return classical.denoise(pool, tuned, noisy.numpy())

        yield Trial(name, denoise, data.test[:test_examples], config, tuned.milliseconds, {"details": str(tuned)})


def save(folder: Path, scores: Sequence[Score], data: Splits, tuned_on: int) -> str:
    """Write score_table.md, .csv and .png, and return the Markdown.

    Rows are sorted by PSNR, the best last. The filters were tuned on `tuned_on` validation images.
    """
    config = scores[0].trial.config
    scored = sorted(rows(scores), key=lambda row: row["psnr"][0])
    report.write_csv(folder / "score_table.csv", scored)
    samples = {score.trial.denoiser: score.samples for score in reversed(scores)}  # of the first seed
    images = {}
    for row in scored:
        name = textwrap.fill(row["denoiser"], 24, break_on_hyphens=False)
        images[f"{name}\n{report.cell(row, 'psnr')[:5]} dB"] = samples[row["denoiser"]]
    plots.save_grid(folder / "score_table.png", images | {"clean": data.test[:SAMPLES].pixels / 255})
    level = f"Gaussian noise of standard deviation {scored[0]['level']}, clipped to [0, 1]"
    text = f"# Denoising {config.dataset}: {level}\n\n"
    text += report.table([{name: row.get(name) for name in COLUMNS} for row in scored])
    text += "".join(f"- {row['denoiser']}: {row['details']}.\n" for row in scored if "details" in row)
    text += "\n## Protocol\n\n" + "".join(f"- {rule}\n" for rule in _protocol(config, data, tuned_on))
    atomic_write(folder / "score_table.md", text)
    return text


def _protocol(config: RunConfig, data: Splits, tuned_on: int) -> list[str]:
    """Return the rules by which the table was made."""
    machine = environment()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or runtime.cores()
    return [
        f"Images: {config.dataset}, {len(data.train):,} to train on, unless noted, the last {len(data.validation):,} "
        f"training images to validate on, and {len(data.test):,} to test on. No test image was used to choose "
        "anything; a run keeps the epoch with the lowest validation loss.",
        f"Noise: clip(x + {noise_level(config):g} n, 0, 1), n standard normal and independent for each value, drawn "
        "with the seed of a run, or else with seed 0.",
        f"Metrics: means over images. PSNR has maximum 1, SSIM a Gaussian window of {WINDOW} x {WINDOW} pixels with "
        f"sigma {SIGMA}. Several seeds: the mean and, in brackets, its {LEVEL:.0%} t-interval.",
        f"Filters: tuned for the best mean PSNR on {tuned_on:,} validation images. The output of each is multiplied by "
        "a gain and added to an offset, fitted to the same images, because clipped noise does not have mean 0.",
        f"Milliseconds per image: {machine['cpu']}, threads: {threads}; the median; filters take one image at a time, "
        "the others a batch. Seconds to train are those of the machine that trained the run.",
        f"Versions: {', '.join(f'{name} {number}' for name, number in machine['versions'].items())}.",
    ]
