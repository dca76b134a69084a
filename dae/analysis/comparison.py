"""Comparison of values of one setting, such as losses: their runs, statistics and a written conclusion.

Runs with the same seed share initial weights, order of images and noise, so differences are paired by seed. Each run is
represented by the epoch whose model it kept, the one with the lowest validation loss. Values are ranked by metrics,
never by their losses, which are not comparable. A run that is no better than the best constant image did not learn: it
is counted, but never averaged. Source: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks
(2021).
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dae import config as config_module
from dae import plugins
from dae.analysis.statistics import LEVEL, Difference, Estimate, differences, estimate
from dae.analysis.tuning import Progress, Tuning, kept_line, planned_epochs, tune
from dae.config import RunConfig, canonicalize, flag
from dae.data.images import value_range
from dae.data.pipeline import Batch, evaluation_batches
from dae.errors import Diverged, Interrupted, UsageError
from dae.evaluation.evaluate import compiled_by_shape
from dae.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from dae.models.fused_layers import fused
from dae.training.task import Task, prepare
from dae.training.trainer import train
from dae.workdir import workdir
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report, slug

SPLITS = ("validation", "test")


def candidates(field: str, values: Sequence[Any], config: RunConfig) -> dict[str, RunConfig]:
    """Return, by the name of each value of `field`, the configuration with it."""
    changes: list[dict[str, Any]] = [{field: value} for value in values]
    configs = [canonicalize(dataclasses.replace(config, **change)) for change in changes]
    # A value can be compared with itself, so names may have to be numbered.
    names = plugins.unique_names(slug(_text(getattr(one, field))).strip("-") for one in configs)
    return dict(zip(names, configs, strict=True))


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The metrics of finished runs, one value per seed for each compared value."""

    field: str
    """The field of RunConfig whose values are compared."""
    names: list[str]
    """The compared values; differences are from the first."""
    seeds: list[int]
    runs: dict[str, list[str]]
    """By name: the folders of the runs, one per seed."""
    epochs: dict[str, list[int]]
    """By name: the epoch whose model each run kept."""
    learned: dict[str, list[bool]]
    """By name: whether each run is better than the best constant image."""
    seconds: dict[str, float]
    """By name: training time of all runs, without tuning."""
    metrics: dict[str, dict[str, dict[str, list[float]]]]
    """By split (validation or test), metric and name: one value per seed."""
    tunings: dict[str, Tuning] = dataclasses.field(default_factory=dict)
    """By name: the result of tuning; empty if learning rates were not tuned."""
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By name, and by the name of a loss: its mean over the test images and the seeds that learned."""

    def estimates(self, split: str, metric: str) -> dict[str, Estimate]:
        """Return for each name the mean over the seeds that learned, with its interval; NaN if none did."""
        values = self.metrics[split][metric]
        return {
            name: estimate([value for value, learned in zip(values[name], self.learned[name], strict=True) if learned])
            for name in self.names
        }

    def differences(self, split: str, metric: str) -> dict[str, Difference]:
        """Return for each other name the difference from the first, over the seeds in which both learned."""
        values, (first, *others) = self.metrics[split][metric], self.names
        pairs = []
        for name in others:
            both = [all(learned) for learned in zip(self.learned[first], self.learned[name], strict=True)]
            pairs.append((list(itertools.compress(values[first], both)), list(itertools.compress(values[name], both))))
        return dict(zip(others, differences(pairs), strict=True))


def compare(
    field: str,
    configs: Mapping[str, RunConfig],
    seeds: Sequence[int],
    metric: str,
    output: Path,
    tuning_rates: int | None = None,
) -> tuple[Comparison, dict[str, RunConfig]]:
    """Train every configuration with each seed; return the comparison, and the configurations that were trained.

    With `tuning_rates`, the learning rate of each is tuned first, in so many rates, with the configuration's own seed;
    `seeds` must be others. The runs are in `output`/NAME/seed-N, or with tuning in `output`/NAME/tuning/rate-R and
    `output`/NAME/tuned/seed-N. Finished ones are skipped and others resumed, so that the same call continues after any
    interruption, to the same result. Raises UsageError for whatever would fail later, before the first run.
    """
    # TensorFlow would warn of retracing, because it mistakes the functions that the runs compile for one function.
    tf.get_logger().addFilter(lambda record: "tf.function retracing" not in record.getMessage())
    tasks = {name: prepare(config) for name, config in configs.items()}
    # Or else runs of other noise levels, which resuming allows if none is given, would be taken for these.
    configs = {
        name: dataclasses.replace(config, noise_level=tasks[name].config.noise_level)
        for name, config in configs.items()
    }
    for task in tasks.values():
        if not len(task.data.validation):
            raise UsageError(f"{flag('validation_examples')}: 0, but runs are ranked on validation images")
    # Runs at a tuned learning rate are apart from those at the given one.
    parents = {name: output / name / ("tuned" if tuning_rates else "") for name in configs}
    runs = {name: [parent / f"seed-{seed}" for seed in seeds] for name, parent in parents.items()}
    check_output(output, configs, runs)
    epochs = {name: config.epochs for name, config in configs.items()}
    tuning_epochs = [planned_epochs(count, tuning_rates) for count in epochs.values() if tuning_rates]
    progress = Progress(len(seeds) * sum(epochs.values()) + sum(tuning_epochs))
    tunings: dict[str, Tuning] = {}
    trained = dict(configs)
    try:
        for name, config in configs.items() if tuning_rates else ():
            tunings[name] = tune(config, metric, tuning_rates or 0, output / name / "tuning", progress)
            trained[name] = dataclasses.replace(config, learning_rate=tunings[name].best)
        for (number, seed), name in itertools.product(enumerate(seeds), configs):
            with progress.part(f"{name}, seed {seed}", epochs[name]) as advance:
                config = dataclasses.replace(trained[name], seed=seed)
                try:
                    report = train(config, runs[name][number], resume=True, quiet=True, on_epoch_end=advance)
                    outcome = f"kept epoch {report['epoch']} of {config.epochs}"
                except Diverged as error:
                    outcome = str(error)
            progress.bar.write(f"{name}, seed {seed}: {outcome}")
    except Interrupted as stop:
        raise Interrupted(stop.signal_number, f"{stop}; repeat the command to continue") from None
    finally:
        progress.close()
    comparison = gather(field, runs, seeds, constant_scores(tasks, metric), metric)
    scores = score_by_losses(comparison, tasks) if field == "loss" else {}
    return dataclasses.replace(comparison, tunings=tunings, scores=scores), trained


def constant_scores(tasks: Mapping[str, Task], metric: str) -> dict[str, float]:
    """Return `constant_score` by name; it depends on the images alone, and is computed once for equal ones."""
    by_digest = {task.config.data_digest: task for task in tasks.values()}
    scores = {digest: constant_score(task, metric) for digest, task in by_digest.items()}
    return {name: scores[task.config.data_digest] for name, task in tasks.items()}


def constant_score(task: Task, metric: str) -> float:
    """Return the metric on validation images of the best constant image: the mean or the median of training images."""
    images, config = task.data.train[:10_000], task.config
    black, white = value_range(images, config.value_range)
    # One value for each pixel, or, if images have several sizes, for each channel.
    axes = (0,) if images.sizes is None and config.patch_size is None else tuple(range(images.pixels.ndim - 1))
    scores = []
    for constant in (images.clean.mean(axis=axes), np.median(images.clean, axis=axes)):
        total, count = 0.0, 0
        for batch in evaluation_batches(task.data.validation, task.config, "validation"):
            constants = tf.broadcast_to(tf.cast((constant - black) / (white - black), tf.float32), batch.clean.shape)
            total += float(tf.reduce_sum(METRICS[metric](batch.clean, constants)))
            count += len(batch.clean)
        scores.append(total / count)
    return max(scores) if metric in HIGHER_IS_BETTER else min(scores)


def gather(
    field: str,
    runs: Mapping[str, Sequence[Path]],
    seeds: Sequence[int],
    constants: Mapping[str, float],
    metric: str,
) -> Comparison:
    """Read the metrics of finished runs, and of runs that diverged, which did not learn.

    `runs` maps each name to its runs' folders, one per seed, and `constants` each name to the metric that a run must
    exceed to have learned.
    """
    names = list(runs)
    comparison = Comparison(
        field,
        names,
        list(seeds),
        runs={name: list(map(str, folders)) for name, folders in runs.items()},
        epochs={name: [] for name in names},
        learned={name: [] for name in names},
        seconds=dict.fromkeys(names, 0.0),
        metrics={split: {metric: {name: [] for name in names} for metric in METRICS} for split in SPLITS},
    )
    for name, folder in [(name, folder) for name, folders in runs.items() for folder in folders]:
        lines = read_metrics(folder) if (folder / workdir.METRICS).exists() else []
        comparison.seconds[name] += sum(each["seconds"] for each in lines)
        if (folder / workdir.REPORT).exists():
            report, line = read_report(folder), kept_line(lines)
        else:  # it diverged
            report = line = collections.defaultdict(lambda: math.nan, epoch=0)
        comparison.epochs[name].append(int(report["epoch"]))
        for split, source in zip(SPLITS, (line, report), strict=True):
            for each in METRICS:
                comparison.metrics[split][each][name].append(source[f"{split}_{each}"])
        better = line[f"validation_{metric}"] - constants[name]
        comparison.learned[name].append(bool(better > 0 if metric in HIGHER_IS_BETTER else better < 0))
    return comparison


def score_by_losses(comparison: Comparison, tasks: Mapping[str, Task]) -> dict[str, dict[str, float]]:
    """Return the mean of each compared loss over the test images, for the networks that were trained on each loss.

    Left out as scorers are losses that need more than clean and denoised images, or have weights.
    """
    scorers = {name: task.loss for name, task in tasks.items() if not task.loss.inputs and not task.loss.layers}
    task = next(iter(tasks.values()))

    @compiled_by_shape
    def batch_sums(batch: Batch) -> dict[str, tf.Tensor]:
        denoised = fused(task.model, training=False)(batch.noisy).denoised
        return {name: tf.reduce_sum(loss(batch.clean, denoised)["loss"]) for name, loss in scorers.items()}

    scores: dict[str, dict[str, list[float]]] = {}
    for name in comparison.names:
        scores[name] = {scorer: [] for scorer in scorers}
        for folder, seed, learned in zip(
            comparison.runs[name], comparison.seeds, comparison.learned[name], strict=True
        ):
            if not learned:
                continue
            task.model.set_weights(load_model(Path(folder)).get_weights())
            totals = dict.fromkeys(scorers, 0.0)
            for batch in evaluation_batches(task.data.test, dataclasses.replace(task.config, seed=seed), "test"):
                for scorer, total in batch_sums(batch).items():
                    totals[scorer] += float(total)
            for scorer, total in totals.items():
                scores[name][scorer].append(total / len(task.data.test))
    return {
        name: {scorer: float(np.mean(values)) if values else math.nan for scorer, values in by_scorer.items()}
        for name, by_scorer in scores.items()
    }


def conclusion(comparison: Comparison, metric: str) -> str:
    """Return, a sentence per line, what can and what cannot be concluded from the metrics on validation images."""
    estimates = comparison.estimates("validation", metric)
    learned = [name for name in comparison.names if any(comparison.learned[name])]
    ranked = sorted(learned, key=lambda name: estimates[name].mean, reverse=metric in HIGHER_IS_BETTER)
    count = len(comparison.seeds)
    sentences = [
        f"By mean {metric} on validation images over {count} seed{'s' if count > 1 else ''}, from best to worst: "
        + (", ".join(f"{name} ({estimates[name].mean:.5g})" for name in ranked) or "none")
        + "."
    ]
    for name in comparison.names:
        if failed := comparison.learned[name].count(False):
            sentences.append(
                f"{name} did not learn in {failed} of {count} seeds (no better than the best constant image); these "
                "runs are left out of all means and differences."
            )
    if count == 1:
        sentences.append("A single seed does not show how much of this is due to chance; use --seeds 3 or more.")
    first = comparison.names[0]
    for name, difference in comparison.differences("validation", metric).items():
        interval = f"{difference.mean:+.3g}, 95 % interval [{difference.low:+.3g}, {difference.high:+.3g}]"
        if difference.identical:
            sentences.append(f"{name} and {first} are identical in every seed.")
        elif difference.p_corrected < 1 - LEVEL:
            better = (difference.mean > 0) == (metric in HIGHER_IS_BETTER)
            sentences.append(
                f"{name} is {'better' if better else 'worse'} than {first}: {interval}, corrected p = "
                f"{difference.p_corrected:.2g}."
            )
        elif not math.isnan(difference.p):
            sentences.append(
                f"{name} and {first}: no significant difference, {interval}, corrected p = "
                f"{difference.p_corrected:.2g}, which does not prove that there is none."
            )
    if comparison.tunings:
        rates = ", ".join(f"{name} {tuning.best:g}" for name, tuning in comparison.tunings.items())
        sentences.append(f"Learning rates, tuned on validation images with a seed that no final run has: {rates}.")
        for name, tuning in comparison.tunings.items():
            if tuning.is_at_edge:
                sentences.append(f"The best learning rate of {name} is at the edge of those tried; it may be better.")
    rate = "" if comparison.tunings or comparison.field == "learning_rate" else "the same learning rate for all, and "
    sentences.append(
        f"These results hold for {rate}these settings and this number of epochs; only differences from {first} were "
        "tested."
    )
    return "\n".join(sentences)


def check_output(output: Path, configs: Mapping[str, RunConfig], runs: Mapping[str, Sequence[Path]]) -> None:
    """Raise UsageError if a run in `output` has other settings than those of its name, or is in use."""
    for name, config in configs.items():
        for folder in runs[name]:
            if folder.exists():
                workdir.has_run(folder)
        for file in sorted((output / name).glob("**/config.json")):
            saved = config_module.read(file)
            changes: dict[str, Any] = {"seed": saved.seed}
            if file.parent.parent != output / name:  # a run of tuning, or at a tuned rate
                changes["learning_rate"] = saved.learning_rate
            with workdir.opened(file.parent, dataclasses.replace(config, **changes), resume=True):
                pass
