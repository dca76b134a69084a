"""Comparison of values of one setting, such as losses: their runs, statistics and a written conclusion.

Runs with the same seed share initial weights, shuffled order and noise, so differences are paired by seed. Each run is
represented by the epoch whose model it kept, the one with the lowest validation loss. Values are ranked by metrics,
never by their losses, which are not comparable. A run that is no better than the best constant image did not learn: it
is counted, but left out of all means. Source: Bouthillier et al., Accounting for Variance in Machine Learning
Benchmarks (2021).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dae import config as config_module
from dae import plugins
from dae.analysis import report, statistics
from dae.analysis.statistics import LEVEL, MIN_SEEDS, Estimate
from dae.analysis.tuning import best_rate, tune_learning_rate
from dae.config import RunConfig, flag
from dae.data.pipeline import evaluation_batches
from dae.errors import Diverged, Interrupted, RunError, UsageError, named_warnings
from dae.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from dae.files import atomic_write
from dae.reporting import plots
from dae.training.task import Task, prepare
from dae.training.trainer import train
from dae.workdir import workdir
from dae.workdir.workdir import finished_report, read_metrics, slug

SPLITS = ("validation", "test")
FAILED, INTERVAL = "did not learn", f"{LEVEL:.0%} interval"


def candidates(field: str, values: Sequence[Any], config: RunConfig) -> dict[str, RunConfig]:
    """Return, by the name of each value of `field`, the configuration with it."""
    configs = [dataclasses.replace(config, **{field: value}) for value in values]
    # A value can be compared with itself, so names may have to be numbered.
    names = plugins.unique_names(slug(str(getattr(candidate, field))).strip("-") for candidate in configs)
    return dict(zip(names, configs, strict=True))


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of a finished run, or of one that diverged."""

    name: str
    """The compared value."""
    seed: int
    epoch: int
    """The epoch whose model it kept; 0 if it diverged."""
    learned: bool
    """True if it is better than the best constant image."""
    seconds: float
    """Training time."""
    metrics: dict[str, float]
    """By name, such as validation_psnr and test_psnr; empty if it diverged."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs of each compared value, one per seed."""

    field: str
    """The field of RunConfig whose values are compared."""
    names: list[str]
    """The compared values; differences are from the first."""
    seeds: list[int]
    metrics: list[str]
    """The metrics of the runs: the package's, and those of --metrics."""
    runs: list[Run]
    tunings: dict[str, dict[float, float]] = dataclasses.field(default_factory=dict)
    """By name: the score of each learning rate; empty if they were not tuned."""
    warnings: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By name: the warnings that its configuration gives."""
    mixed: list[str] = dataclasses.field(default_factory=list)
    """Losses that were minimized by themselves in less than half of the steps, because of the BCE warm-up."""

    def runs_of(self, name: str) -> list[Run]:
        """Return the runs of a compared value."""
        return [run for run in self.runs if run.name == name]

    def estimates(self, metric: str) -> dict[str, Estimate]:
        """Return, by name, the statistics of a metric such as test_psnr over the seeds that learned."""
        return statistics.estimates(
            {name: {run.seed: run.metrics[metric] for run in self.runs_of(name) if run.learned} for name in self.names}
        )


def compare(
    field: str, configs: Mapping[str, RunConfig], seeds: Sequence[int], metric: str, output: Path, tuning_rates: int = 0
) -> Comparison:
    """Train every configuration with each seed, and return the comparison.

    With `tuning_rates`, the learning rate of each is first tuned on a grid of that many rates, with the configuration's
    own seed; `seeds` must be others. The runs are in `output`/NAME/seed-N, or with tuning in
    `output`/NAME/tuning/rate-R and `output`/NAME/tuned/seed-N. Finished runs are skipped and others resumed, so that
    the same call continues after any interruption, with the same result. Raises UsageError before the first run for
    whatever would fail later.
    """
    tasks, warnings = dict[str, Task](), dict[str, list[str]]()
    for name, config in configs.items():
        warnings[name] = []
        with named_warnings(name, warnings[name]):
            tasks[name] = task = prepare(config)
        if not len(task.data.validation):
            raise UsageError(f"{flag('validation_examples')}: 0, but runs are ranked on validation images")
    # Runs at a tuned learning rate are in other folders than those at the given one.
    folders = {
        (name, seed): output / name / ("tuned" if tuning_rates else "") / f"seed-{seed}"
        for seed, name in itertools.product(seeds, configs)
    }
    for name, config in configs.items():
        check_output(output / name, config)
    trained, tunings = dict(configs), dict[str, dict[float, float]]()
    try:
        for name, config in configs.items() if tuning_rates else ():
            with named_warnings(f"{name}, tuning", [*warnings[name]]):
                tunings[name] = tune_learning_rate(config, metric, tuning_rates, output / name / "tuning")
            trained[name] = dataclasses.replace(config, learning_rate=best_rate(tunings[name], metric))
        progress = tqdm(folders.items(), unit=" runs", disable=None)
        for (name, seed), folder in progress:
            with named_warnings(f"{name}, seed {seed}", [*warnings[name]]):
                try:
                    finished = train(dataclasses.replace(trained[name], seed=seed), folder, resume=True, quiet=True)
                    outcome = f"kept epoch {finished['epoch']} of {trained[name].epochs}"
                except Diverged as error:
                    outcome = str(error)
            progress.write(f"{name}, seed {seed}: {outcome}")
    except Interrupted as stop:
        raise Interrupted(stop.signal_number, f"{stop.message}; repeat the command to continue") from None
    except RunError as error:
        if error.run_dir is None:
            raise
        raise RunError(f"{error.message}; repeat the command to continue") from error
    constants = {name: constant_score(task, metric) for name, task in tasks.items()}
    metrics = list(next(iter(tasks.values())).metrics)
    runs = [
        read_run(name, seed, folder, trained[name], metrics, metric, constants[name])
        for (name, seed), folder in folders.items()
    ]
    mixed = [name for name, task in tasks.items() if field == "loss" and task.is_mostly_warmup]
    return Comparison(field, list(configs), list(seeds), metrics, runs, tunings, warnings, mixed)


def constant_score(task: Task, metric: str) -> float:
    """Return the metric on validation images of the best constant image: the mean or the median of training images."""
    images, config = task.data.train[:10_000], task.config
    # One value for each pixel, or, if images have several sizes, for each channel.
    axes = (0,) if images.sizes is None and config.patch_size is None else tuple(range(images.pixels.ndim - 1))
    scores = []
    for constant in (images.clean.mean(axis=axes), np.median(images.clean, axis=axes)):
        scaled = images.value_range.to_unit(constant)
        values = [
            METRICS[metric](batch.clean, tf.broadcast_to(scaled, batch.clean.shape)).numpy()
            for batch in evaluation_batches(task.data.validation, config, "validation")
        ]
        scores.append(float(np.concatenate(values).mean()))
    return max(scores) if metric in HIGHER_IS_BETTER else min(scores)


def read_run(
    name: str, seed: int, folder: Path, config: RunConfig, metrics: Sequence[str], metric: str, constant: float
) -> Run:
    """Return the results of the run of `config` in `folder`, which has learned if its `metric` beats `constant`."""
    lines, test_results = read_metrics(folder), finished_report(folder, config)
    seconds = sum(line["seconds"] for line in lines)
    if test_results is None:  # it diverged
        return Run(name, seed, 0, False, seconds, {})
    results = lines[test_results["epoch"] - 1] | test_results
    values = {column: results[column] for column in (f"{split}_{name}" for split in SPLITS for name in metrics)}
    better = values[f"validation_{metric}"] - constant
    learned = better > 0 if metric in HIGHER_IS_BETTER else better < 0
    return Run(name, seed, int(results["epoch"]), learned, seconds, values)


def conclusion(comparison: Comparison, metric: str) -> str:
    """Return, a sentence per line, what can and what cannot be concluded from the metrics on validation images."""
    estimates = comparison.estimates(f"validation_{metric}")
    learned = [name for name in comparison.names if not math.isnan(estimates[name].mean.mean)]
    ranked = sorted(learned, key=lambda name: estimates[name].mean.mean, reverse=metric in HIGHER_IS_BETTER)
    count = len(comparison.seeds)
    sentences = [
        f"By mean {metric} on validation images over {count} seed{'s' if count > 1 else ''}, from best to worst: "
        + (", ".join(f"{name} ({estimates[name].mean.mean:.5g})" for name in ranked) or "none")
        + "."
    ]
    for name in comparison.names:
        if failed := sum(not run.learned for run in comparison.runs_of(name)):
            sentences.append(
                f"{name} did not learn in {failed} of {count} seeds (no better than the best constant image); these "
                "runs are left out of all means and differences."
            )
    first, *others = comparison.names
    for name in others:
        estimate, mixed = estimates[name], [loss for loss in (first, name) if loss in comparison.mixed]
        if math.isnan(estimate.p) or mixed:
            reason = f"which takes at least {MIN_SEEDS} seeds (--seeds) with which both learn"
            if mixed:
                reason = f"because {' and '.join(mixed)} was minimized by itself in less than half of the steps"
                reason += "; use fewer --bce-steps, or train longer"
            sentences.append(f"{name} and {first}: no conclusion, {reason}.")
            continue
        mean, low, high = estimate.difference
        interval = f"{mean:+.3g}, 95 % interval [{low:+.3g}, {high:+.3g}], corrected p = {estimate.p_corrected:.2g}"
        if estimate.p_corrected < 1 - LEVEL:
            is_better = (mean > 0) == (metric in HIGHER_IS_BETTER)
            sentences.append(f"{name} is {'better' if is_better else 'worse'} than {first}: {interval}.")
        else:
            sentences.append(
                f"{name} and {first}: no significant difference, {interval}, which does not prove that there is none."
            )
    if comparison.tunings:
        best = {name: best_rate(scores, metric) for name, scores in comparison.tunings.items()}
        rates = ", ".join(f"{name} {rate:g}" for name, rate in best.items())
        sentences.append(f"Learning rates, tuned on validation images with a seed that no final run has: {rates}.")
        for name, scores in comparison.tunings.items():
            if best[name] in (min(scores), max(scores)):
                sentences.append(f"The best learning rate of {name} is at the edge of those tried; try more --rates.")
    sentences += [f"{name}: warning: {text}" for name, found in comparison.warnings.items() for text in found]
    rate = "" if comparison.tunings or comparison.field == "learning_rate" else "the same learning rate for all, and "
    sentences.append(
        f"These results hold for {rate}these settings and epochs; only differences from {first} were tested."
    )
    return "\n".join(sentences)


def check_output(folder: Path, config: RunConfig) -> None:
    """Raise UsageError if a run in `folder` has other settings than `config`, or is in use."""
    for file in sorted(folder.glob("**/config.json")):
        saved = config_module.read(file)
        changes: dict[str, Any] = {"seed": saved.seed}
        if file.parent.parent != folder:  # a run of tuning, or at a tuned rate
            changes["learning_rate"] = saved.learning_rate
        with workdir.opened(file.parent, dataclasses.replace(config, **changes), resume=True):
            pass


def save(comparison: Comparison, metric: str, folder: Path, config: RunConfig) -> None:
    """Write comparison.md, .csv (a row per run) and .png.

    `metric` ranks the names, and `config` has the settings that all runs share. The picture shows the paired
    differences from the first name, with their intervals.
    """
    facts = ("seed", "epoch", "learned", "seconds")
    rows = [
        {comparison.field: run.name} | {fact: getattr(run, fact) for fact in facts} | run.metrics
        for run in comparison.runs
    ]
    report.write_csv(folder / "comparison.csv", rows)
    text = f"# Comparison of {', '.join(f'`{name}`' for name in comparison.names)}\n\n"
    text += "".join(f"- {sentence}\n" for sentence in conclusion(comparison, metric).splitlines()) + "\n"
    for title, table in _tables(comparison, metric):
        text += f"{title}\n\n{report.table(table)}"
    varied = {comparison.field, "seed", *(["learning_rate"] if comparison.tunings else [])}
    shared = config_module.shortest(config, varied)
    text += f"Seeds {', '.join(map(str, comparison.seeds))}; preset {shared}.\n"
    atomic_write(folder / "comparison.md", text)
    # The first panel is what the conclusion is about.
    metrics = sorted(comparison.metrics, key=lambda name: name != metric)
    panels = list(itertools.product(SPLITS, metrics))
    figure, axes = plots.panels(len(panels), len(metrics), (3, 1 + 0.25 * len(comparison.names)))
    for axis, (split, name) in zip(axes, panels, strict=True):
        for position, estimate in enumerate(comparison.estimates(f"{split}_{name}").values()):
            mean, low, high = estimate.difference
            axis.errorbar(mean, position, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072b2", capsize=3)
        axis.axvline(0, color="#999999", linewidth=1)
        axis.set_yticks(range(len(comparison.names)), comparison.names)
        axis.label_outer()
        axis.set(title=f"{split} {report.TITLES.get(name, name)}", ylim=(len(comparison.names) - 0.5, -0.5))
        axis.tick_params(axis="x", labelsize="small")
        axis.locator_params(axis="x", nbins=4)  # long numbers, side by side
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"paired differences from {comparison.names[0]}, {INTERVAL}", fontsize="medium")
    plots.save(folder / "comparison.png", figure)


def _tables(comparison: Comparison, metric: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the title of each table, and its rows."""
    field, first, tunings = comparison.field, comparison.names[0], comparison.tunings
    for split in SPLITS:
        estimates = {column: comparison.estimates(f"{split}_{column}") for column in comparison.metrics}
        title = (
            f"{split.capitalize()} images: mean over seeds [{INTERVAL}], and paired difference from `{first}` "
            f"[{INTERVAL}], p, and p corrected for the number of comparisons (Holm, separately for each metric)"
        )
        rows = [
            {field: f"`{name}`"} | {column: _mean(found[name]) for column, found in estimates.items()}
            for name in comparison.names
        ]
        rows += [
            {field: f"`{name}` - `{first}`"} | {column: _difference(found[name]) for column, found in estimates.items()}
            for name in comparison.names[1:]
        ]
        yield title, rows
    if tunings:
        rows = [
            {field: f"`{name}`"}
            | {f"{rate:g}": "diverged" if math.isnan(score) else score for rate, score in scores.items()}
            for name, scores in tunings.items()
        ]
        yield f"Tuning: validation {metric} by learning rate", rows


def _mean(estimate: Estimate) -> Any:
    return FAILED if math.isnan(estimate.mean.mean) else estimate.mean


def _difference(estimate: Estimate) -> str:
    p_values = "" if math.isnan(estimate.p) else f" p {estimate.p:.2g}, {estimate.p_corrected:.2g}"
    return FAILED if math.isnan(estimate.difference.mean) else f"{estimate.difference:+.4f}{p_values}"
