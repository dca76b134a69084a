"""Comparison of losses: their runs, statistics, a written conclusion, and plots.

Runs with the same seed share initial weights, order of images and noise, so differences between losses are paired by
seed. Each run is represented by the epoch whose model it kept, the one with the lowest validation loss. Losses are
ranked by metrics, never by their own values, which are not comparable.
"""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dae import plugins
from dae.analysis.statistics import LEVEL, Difference, Estimate, differences, estimate
from dae.config import RunConfig, canonicalize, flag
from dae.data import datasets
from dae.errors import Interrupted
from dae.evaluation.evaluate import denoise_samples
from dae.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from dae.reporting import plots
from dae.training.task import prepare
from dae.training.trainer import train
from dae.workdir.files import atomic_write
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report, slug

SPLITS = ("validation", "test")


def train_all(losses: Sequence[str], config: RunConfig, seeds: Sequence[int], output: Path) -> dict[str, list[Path]]:
    """Train each loss with each seed, and return, by the name of each loss, the folders of its runs, one per seed.

    The runs are in `output`/NAME/seed-N. Finished ones are skipped and others resumed, so that the same call continues
    after any interruption. Raises UsageError for a mistake in any of the losses before the first is trained.
    """
    # TensorFlow would warn of retracing, because it mistakes the functions that the runs compile for one function.
    tf.get_logger().addFilter(lambda record: "tf.function retracing" not in record.getMessage())
    each = [canonicalize(dataclasses.replace(config, loss=loss)) for loss in losses]
    for one in each:
        prepare(one)
    # A loss can be compared with itself, so names may have to be numbered.
    configs = dict(zip(plugins.unique_names(slug(one.loss) for one in each), each, strict=True))
    runs = {name: [output / name / f"seed-{seed}" for seed in seeds] for name in configs}
    todo = list(itertools.product(seeds, configs))
    with tqdm(total=len(todo) * config.epochs, unit=" epochs", disable=None) as bar:
        for done, (seed, name) in enumerate(todo):
            bar.set_description(f"{name}, seed {seed}")

            def advance(line: Mapping[str, float], before: int = done * config.epochs) -> None:
                bar.update(before + int(line["epoch"]) - bar.n)

            one = dataclasses.replace(configs[name], seed=seed)
            folder = output / name / f"seed-{seed}"
            try:
                report = train(one, folder, resume=True, quiet=True, on_epoch_end=advance)
            except Interrupted as stop:
                message = f"stopped in {folder}, which is saved; repeat the command to continue"
                raise Interrupted(stop.signal_number, message) from None
            advance({"epoch": config.epochs})
            bar.write(f"{name}, seed {seed}: kept epoch {report['epoch']} of {config.epochs}")
    return runs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The metrics of finished runs, one value per seed for each loss."""

    losses: list[str]
    seeds: list[int]
    epochs: dict[str, list[int]]
    """By loss: the epoch whose model each run kept."""
    metrics: dict[str, dict[str, dict[str, list[float]]]]
    """By split (validation or test), metric and loss: one value per seed."""

    def estimates(self, split: str, metric: str) -> dict[str, Estimate]:
        """Return the mean over seeds, with its interval, for each loss."""
        return {loss: estimate(values) for loss, values in self.metrics[split][metric].items()}

    def differences(self, split: str, metric: str) -> dict[str, Difference]:
        """Return the difference from the first loss for each other loss."""
        first, *others = self.metrics[split][metric].values()
        return dict(zip(self.losses[1:], differences(first, others), strict=True))


def gather(runs: Mapping[str, Sequence[Path]], seeds: Sequence[int]) -> Comparison:
    """Read the metrics of finished runs; `runs` maps the name of each loss to its runs' folders, one per seed."""
    epochs: dict[str, list[int]] = {}
    metrics: dict = {split: {metric: {loss: [] for loss in runs} for metric in METRICS} for split in SPLITS}
    for loss, folders in runs.items():
        for folder in folders:
            report = read_report(folder)
            line = read_metrics(folder)[int(report["epoch"]) - 1]
            epochs.setdefault(loss, []).append(int(report["epoch"]))
            for split, source in zip(SPLITS, (line, report), strict=True):
                for metric in METRICS:
                    metrics[split][metric][loss].append(source[f"{split}_{metric}"])
    return Comparison(list(runs), list(seeds), epochs, metrics)


def conclusion(comparison: Comparison, metric: str) -> str:
    """Return, a sentence per line, what can and what cannot be concluded from the metrics on validation images."""
    means = {loss: one.mean for loss, one in comparison.estimates("validation", metric).items()}
    ranked = sorted(means, key=lambda loss: means[loss], reverse=metric in HIGHER_IS_BETTER)
    count = len(comparison.seeds)
    sentences = [
        f"By mean {metric} on validation images over {count} seed{'s' if count > 1 else ''}, from best to worst: "
        + ", ".join(f"{loss} ({means[loss]:.5g})" for loss in ranked)
        + "."
    ]
    if count == 1:
        sentences.append("A single seed does not show how much of this is due to chance; use --seeds 3 or more.")
    first = comparison.losses[0]
    for loss, difference in comparison.differences("validation", metric).items():
        interval = f"{difference.mean:+.3g}, 95 % interval [{difference.low:+.3g}, {difference.high:+.3g}]"
        if difference.identical:
            sentences.append(f"{loss} and {first} are identical in every seed.")
        elif difference.p_corrected < 1 - LEVEL:
            better = (difference.mean > 0) == (metric in HIGHER_IS_BETTER)
            sentences.append(
                f"{loss} is {'better' if better else 'worse'} than {first}: {interval}, corrected p = "
                f"{difference.p_corrected:.2g}."
            )
        elif count > 1:
            sentences.append(
                f"{loss} and {first}: no significant difference, {interval}, corrected p = "
                f"{difference.p_corrected:.2g}, which does not prove that there is none."
            )
    sentences.append(
        "These results hold for these settings and this number of epochs, with the same learning rate for all losses; "
        f"only differences from {first} were tested."
    )
    return "\n".join(sentences)


def save(comparison: Comparison, metric: str, folder: Path, config: RunConfig) -> None:
    """Write comparison.md, .csv (a row per split, metric and loss), .json (everything, per seed) and .png."""
    rows = []
    for split, name in itertools.product(SPLITS, METRICS):
        others = comparison.differences(split, name)
        for loss, mean in comparison.estimates(split, name).items():
            row: dict = {"split": split, "metric": name, "loss": loss, **dataclasses.asdict(mean)}
            if loss in others:
                row |= {f"difference_{key}": value for key, value in dataclasses.asdict(others[loss]).items()}
            rows.append({key: None if value != value else value for key, value in row.items()})  # JSON has no NaN
    text = io.StringIO()
    writer = csv.DictWriter(text, max(rows, key=len), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder / "comparison.csv", text.getvalue())
    everything = {**dataclasses.asdict(comparison), "ranked_by": metric, "statistics": rows}
    everything["conclusion"] = conclusion(comparison, metric)
    atomic_write(folder / "comparison.json", json.dumps(everything, indent=2) + "\n")
    atomic_write(folder / "comparison.md", _markdown(comparison, metric, config))
    panels = {
        f"{split} {name}": {loss: dataclasses.astuple(one) for loss, one in comparison.estimates(split, name).items()}
        for split in SPLITS
        for name in ("psnr", "ssim", "mse", "bce")
    }
    plots.save_comparison(folder / "comparison.png", panels, _sample_rows(comparison, folder, config))


def _sample_rows(comparison: Comparison, folder: Path, config: RunConfig) -> dict[str, np.ndarray]:
    """Return the first test images: noisy, denoised with the first seed's model of each loss, and clean."""
    config = dataclasses.replace(config, seed=comparison.seeds[0])
    images = datasets.load(config).test
    models = {loss: load_model(folder / loss / f"seed-{config.seed}") for loss in comparison.losses}
    samples = {loss: denoise_samples(model, config, images) for loss, model in models.items()}
    any_samples = next(iter(samples.values()))
    denoised = {loss: one.denoised for loss, one in samples.items()}
    return {"noisy": any_samples.noisy, **denoised, "clean": any_samples.clean}


def _markdown(comparison: Comparison, metric: str, config: RunConfig) -> str:
    lines = [f"# Comparison of {', '.join(f'`{loss}`' for loss in comparison.losses)}", ""]
    lines += [*(f"- {sentence}" for sentence in conclusion(comparison, metric).splitlines()), ""]
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: mean over seeds [{LEVEL:.0%} interval]"
            + ("; evaluated once, at the end of each run, and not used to choose anything" if split == "test" else ""),
            ["loss", *METRICS],
            [
                [f"`{loss}`", *(_cell(comparison.estimates(split, name)[loss], ".4f") for name in METRICS)]
                for loss in comparison.losses
            ],
        )
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: paired difference from `{comparison.losses[0]}` [{LEVEL:.0%} interval], p, "
            "and p corrected for the number of losses (Holm, separately for each metric)",
            ["loss", *METRICS],
            [
                [f"`{loss}`", *(_difference_cell(comparison.differences(split, name)[loss]) for name in METRICS)]
                for loss in comparison.losses[1:]
            ],
        )
    kept = "; ".join(f"`{loss}` {', '.join(map(str, epochs))}" for loss, epochs in comparison.epochs.items())
    defaults = dataclasses.asdict(RunConfig())
    flags = [
        f"{flag(name)} {value}"
        for name, value in dataclasses.asdict(config).items()
        if value != defaults[name] and name != "seed"
    ]
    lines += [
        f"Seeds {', '.join(map(str, comparison.seeds))}; {' '.join(flags) or 'default settings'}.",
        f"Epoch that each run kept, the one with its lowest validation loss: {kept}.",
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    body = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return [title, "", *body, ""] if rows else []


def _cell(one: Estimate, form: str) -> str:
    return f"{one.mean:{form}}" + (f" [{one.low:{form}}, {one.high:{form}}]" if one.low == one.low else "")


def _difference_cell(one: Difference) -> str:
    if one.identical:
        return "identical"
    return _cell(one, "+.4f") + (f" p {one.p:.2g}, {one.p_corrected:.2g}" if one.p == one.p else "")
