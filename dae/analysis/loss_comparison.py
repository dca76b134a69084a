"""Which of several losses is better, as far as their runs can tell: the runs, tables, words and a picture.

The runs of one seed share initial weights, order and noise, so losses are compared seed by seed (paired). Each run
counts with the epoch that it kept, that of its least validation loss. Losses are ranked by metrics, never by their
own values, which are not comparable.
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
from dae.config import RunConfig, flag, pinned
from dae.data import datasets
from dae.data.pipeline import first_evaluation_batch
from dae.errors import Stopped
from dae.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from dae.reporting import plots
from dae.training import trainer
from dae.workdir import model_files, workdir
from dae.workdir.workdir import read_metrics, read_report, write

SPLITS = ("validation", "test")
SHOWN_IN_FIGURE = 10


def train(losses: Sequence[str], settings: RunConfig, seeds: Sequence[int], output: Path) -> dict[str, list[Path]]:
    """Trains each loss with each seed and returns the runs' folders, one per seed, by readable names of the losses.

    The runs are in `output`/NAME/seed-N; finished ones are left alone and others gone on with, so that the same call
    goes on after any stop. Raises UsageError for a mistake in any of the losses before the first is trained.
    """
    # Each run compiles functions of its own; TensorFlow takes them for one that is compiled again and again.
    tf.get_logger().addFilter(lambda record: "tf.function retracing" not in record.getMessage())
    each = [pinned(dataclasses.replace(settings, loss=loss)) for loss in losses]
    for config in each:
        trainer.prepare(config)
    # A loss may be compared with itself.
    configs = dict(zip(plugins.distinct(workdir.readable(config.loss) for config in each), each, strict=True))
    runs = {name: [output / name / f"seed-{seed}" for seed in seeds] for name in configs}
    todo = [(seed, name) for seed in seeds for name in configs]
    with tqdm(total=len(todo) * settings.epochs, unit=" epochs", disable=None) as bar:
        for done, (seed, name) in enumerate(todo):
            bar.set_description(f"{name}, seed {seed}")

            def show(line: Mapping[str, float], before: int = done * settings.epochs) -> None:
                bar.update(before + int(line["epoch"]) - bar.n)

            config = dataclasses.replace(configs[name], seed=seed)
            folder = output / name / f"seed-{seed}"
            try:
                report = trainer.train(config, folder, resume=True, quiet=True, after_epoch=show)
            except Stopped as stop:
                raise Stopped(stop.signal_number, f"stopped in {folder}, saved; the same command goes on") from None
            show({"epoch": settings.epochs})
            bar.write(f"{name}, seed {seed}: kept epoch {report['epoch']} of {settings.epochs}")
    return runs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The figures of finished runs: for each loss and metric one per seed, of validation and of test images."""

    losses: list[str]
    seeds: list[int]
    epochs: dict[str, list[int]]
    """The epoch that each run kept."""
    figures: dict[str, dict[str, dict[str, list[float]]]]
    """By split, metric and loss."""

    def estimates(self, split: str, metric: str) -> dict[str, Estimate]:
        """Of each loss, the mean over seeds."""
        return {loss: estimate(values) for loss, values in self.figures[split][metric].items()}

    def differences(self, split: str, metric: str) -> dict[str, Difference]:
        """Of each loss but the first, the difference to the first."""
        first, *others = self.figures[split][metric].values()
        return dict(zip(self.losses[1:], differences(first, others), strict=True))


def gather(runs: Mapping[str, Sequence[Path]], seeds: Sequence[int]) -> Comparison:
    """Reads finished runs: of each loss, by the name that it is to have, one per seed."""
    epochs: dict[str, list[int]] = {}
    figures: dict = {split: {metric: {loss: [] for loss in runs} for metric in METRICS} for split in SPLITS}
    for loss, folders in runs.items():
        for folder in folders:
            report = read_report(folder)
            line = read_metrics(folder)[int(report["epoch"]) - 1]
            epochs.setdefault(loss, []).append(int(report["epoch"]))
            for split, source in zip(SPLITS, (line, report), strict=True):
                for metric in METRICS:
                    figures[split][metric][loss].append(source[f"{split}_{metric}"])
    return Comparison(list(runs), list(seeds), epochs, figures)


def conclusion(comparison: Comparison, metric: str) -> str:
    """What can and what cannot be concluded from validation images, one sentence for each loss."""
    means = {loss: one.mean for loss, one in comparison.estimates("validation", metric).items()}
    ranked = sorted(means, key=lambda loss: means[loss], reverse=metric in HIGHER_IS_BETTER)
    count = len(comparison.seeds)
    sentences = [
        f"By mean {metric} on validation images over {count} seed{'s' if count > 1 else ''}, from best to worst: "
        + ", ".join(f"{loss} ({means[loss]:.5g})" for loss in ranked)
        + "."
    ]
    if count == 1:
        sentences.append("One seed says nothing about how much of this is chance; give --seeds 3 or more.")
    first = comparison.losses[0]
    for loss, difference in comparison.differences("validation", metric).items():
        interval = f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
        if difference.same:
            sentences.append(f"{loss} against {first}: no difference, the very same figures in every seed.")
        elif difference.p_corrected < 1 - LEVEL:
            better = (difference.mean > 0) == (metric in HIGHER_IS_BETTER)
            sentences.append(
                f"{loss} is {'better' if better else 'worse'} than {first}: {interval}, p = "
                f"{difference.p_corrected:.2g} corrected."
            )
        elif count > 1:
            sentences.append(
                f"{loss} against {first}: no difference can be concluded: {interval}, "
                f"p = {difference.p_corrected:.2g} corrected; that is no proof that there is none."
            )
    sentences.append(
        "This holds for these settings and so many epochs, each loss at the same learning rate; orders among the other "
        "losses were not tested."
    )
    return "\n".join(sentences)


def save(comparison: Comparison, metric: str, folder: Path, settings: RunConfig) -> None:
    """Writes comparison.md, .csv (a row per split, metric and loss), .json (all, with each seed's figures) and .png."""
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
    write(folder / "comparison.csv", text.getvalue())
    everything = {**dataclasses.asdict(comparison), "ranked_by": metric, "statistics": rows}
    everything["conclusion"] = conclusion(comparison, metric)
    write(folder / "comparison.json", json.dumps(everything, indent=2) + "\n")
    write(folder / "comparison.md", _markdown(comparison, metric, settings))
    panels = {
        f"{split} {name}": {loss: dataclasses.astuple(one) for loss, one in comparison.estimates(split, name).items()}
        for split in SPLITS
        for name in ("psnr", "ssim", "mse", "bce")
    }
    plots.save_comparison(folder / "comparison.png", panels, _examples(comparison, folder, settings))


def _examples(comparison: Comparison, folder: Path, settings: RunConfig) -> dict[str, np.ndarray]:
    """The first few test images: noisy, as each loss's model of the first seed denoises them, and clean."""
    seed = comparison.seeds[0]
    config = dataclasses.replace(settings, seed=seed)
    batch = first_evaluation_batch(datasets.load(config).test, config, "test")
    noisy, clean = (images[:SHOWN_IN_FIGURE] for images in batch)
    models = {loss: model_files.load_model(folder / loss / f"seed-{seed}") for loss in comparison.losses}
    denoised = {loss: model(noisy).numpy() for loss, model in models.items()}
    return {"noisy": noisy.numpy(), **denoised, "clean": clean.numpy()}


def _markdown(comparison: Comparison, metric: str, settings: RunConfig) -> str:
    lines = [f"# {' against '.join(f'`{loss}`' for loss in comparison.losses)}", ""]
    lines += [*(f"- {sentence}" for sentence in conclusion(comparison, metric).splitlines()), ""]
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: mean over seeds [{LEVEL:.0%} interval]"
            + ("; scored once, at the end of each run, and used for no choice" if split == "test" else ""),
            ["loss", *METRICS],
            [
                [f"`{loss}`", *(_cell(comparison.estimates(split, name)[loss], ".4f") for name in METRICS)]
                for loss in comparison.losses
            ],
        )
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: difference to `{comparison.losses[0]}`, seed by seed "
            "[95% interval], p and p corrected (Holm, over the comparisons of one metric)",
            ["loss", *METRICS],
            [
                [f"`{loss}`", *(_difference(comparison.differences(split, name)[loss]) for name in METRICS)]
                for loss in comparison.losses[1:]
            ],
        )
    kept = "; ".join(f"`{loss}` {', '.join(map(str, epochs))}" for loss, epochs in comparison.epochs.items())
    seeds = ", ".join(map(str, comparison.seeds))
    set_to = [
        f"{flag(field.name)} {getattr(settings, field.name)}"
        for field in dataclasses.fields(RunConfig)
        if getattr(settings, field.name) != field.default and field.name != "seed"
    ]
    lines += [
        f"Seeds {seeds}; {' '.join(set_to) or 'default settings'}.",
        f"Epochs kept, by each run's own validation loss: {kept}.",
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    body = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return [title, "", *body, ""] if rows else []


def _cell(one: Estimate, form: str) -> str:
    return f"{one.mean:{form}}" + (f" [{one.low:{form}}, {one.high:{form}}]" if one.low == one.low else "")


def _difference(one: Difference) -> str:
    if one.same:
        return "the very same"
    return _cell(one, "+.4f") + (f" p {one.p:.2g}, {one.p_corrected:.2g}" if one.p == one.p else "")
