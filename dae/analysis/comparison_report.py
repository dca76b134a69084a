"""The files that a comparison writes: comparison.md, .csv (a row per split, metric and name), .json and .png."""

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dae.analysis.comparison import SPLITS, Comparison, conclusion
from dae.analysis.statistics import LEVEL, Difference, Estimate
from dae.config import RunConfig, flag
from dae.data import datasets
from dae.evaluation.evaluate import denoise_samples
from dae.evaluation.metrics import METRICS
from dae.reporting import plots
from dae.workdir.files import atomic_write
from dae.workdir.model_files import load_model
from dae.workdir.workdir import REPORT


def save(comparison: Comparison, metric: str, folder: Path, configs: Mapping[str, RunConfig]) -> None:
    """Write all files; `metric` ranks the names, and `configs` are what was trained, by name."""
    rows = []
    for split, name in itertools.product(SPLITS, METRICS):
        others = comparison.differences(split, name)
        for value, mean in comparison.estimates(split, name).items():
            row: dict = {"split": split, "metric": name, comparison.field: value, **dataclasses.asdict(mean)}
            if value in others:
                row |= {f"difference_{key}": number for key, number in dataclasses.asdict(others[value]).items()}
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, max(rows, key=len), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_without_nan(rows))
    atomic_write(folder / "comparison.csv", text.getvalue())
    everything = {**dataclasses.asdict(comparison), "ranked_by": metric, "statistics": rows}
    everything["conclusion"] = conclusion(comparison, metric)
    atomic_write(folder / "comparison.json", json.dumps(_without_nan(everything), indent=2) + "\n")
    atomic_write(folder / "comparison.md", _markdown(comparison, metric, configs))
    panels = {
        f"{split} {name}": {value: dataclasses.astuple(one) for value, one in comparison.estimates(split, name).items()}
        for split in SPLITS
        for name in ("psnr", "ssim", "mse", "bce")
    }
    curves = {name: (list(one.scores), list(one.scores.values())) for name, one in comparison.tunings.items()}
    rows_of_images = _sample_rows(comparison, configs)
    plots.save_comparison(folder / "comparison.png", panels, rows_of_images, curves, f"validation {metric}")


def _without_nan(value: Any) -> Any:
    """Return `value` with None in place of NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _sample_rows(comparison: Comparison, configs: Mapping[str, RunConfig]) -> dict[str, np.ndarray]:
    """Return the first test images: noisy, denoised with the first seed's model of each name, and clean.

    A run that diverged has no model, and is left out.
    """
    rows: dict[str, np.ndarray] = {}
    for name, (run, *_) in comparison.runs.items():
        if not (Path(run) / REPORT).exists():
            continue
        config = dataclasses.replace(configs[name], seed=comparison.seeds[0])
        samples = denoise_samples(load_model(Path(run)), config, datasets.load(config).test)
        rows.setdefault("noisy", samples.noisy)
        rows[name], clean = samples.denoised, samples.clean
    return {**rows, "clean": clean} if rows else {}


def _markdown(comparison: Comparison, metric: str, configs: Mapping[str, RunConfig]) -> str:
    names, field = comparison.names, comparison.field
    lines = [f"# Comparison of {', '.join(f'`{name}`' for name in names)}", ""]
    lines += [*(f"- {sentence}" for sentence in conclusion(comparison, metric).splitlines()), ""]
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: mean over seeds [{LEVEL:.0%} interval]"
            + ("; evaluated once, at the end of each run, and not used to choose anything" if split == "test" else ""),
            [field, *METRICS],
            [
                [f"`{name}`", *(_cell(comparison.estimates(split, each)[name], ".4f") for each in METRICS)]
                for name in names
            ],
        )
    for split in SPLITS:
        lines += _table(
            f"{split.capitalize()} images: paired difference from `{names[0]}` [{LEVEL:.0%} interval], p, and p "
            "corrected for the number of comparisons (Holm, separately for each metric)",
            [field, *METRICS],
            [
                [f"`{name}`", *(_difference_cell(comparison.differences(split, each)[name]) for each in METRICS)]
                for name in names[1:]
            ],
        )
    scorers = list(next(iter(comparison.scores.values()), {}))
    lines += _table(
        "Test images: each loss (columns), of the networks trained on each loss (rows), mean over seeds",
        ["trained on", *(f"`{scorer}`" for scorer in scorers)],
        [[f"`{name}`", *map(_score_cell, scores.values())] for name, scores in comparison.scores.items() if scores],
    )
    rates = sorted({rate for tuning in comparison.tunings.values() for rate in tuning.scores})
    lines += _table(
        f"Tuning: {metric} on validation images by learning rate, and after how many epochs; the chosen rate is bold",
        [field, *(f"{rate:g}" for rate in rates)],
        [[f"`{name}`", *(_rate_cell(tuning, rate) for rate in rates)] for name, tuning in comparison.tunings.items()],
    )
    lines += _table(
        "Runs, and minutes of training",
        [field, "tuning runs", "minutes", "final runs", "did not learn", "minutes", "kept epochs"],
        [
            [
                f"`{name}`",
                *(
                    [str(len(comparison.tunings[name].scores)), f"{comparison.tunings[name].seconds / 60:.1f}"]
                    if name in comparison.tunings
                    else ["0", "0.0"]
                ),
                str(len(comparison.seeds)),
                str(comparison.learned[name].count(False)),
                f"{comparison.seconds[name] / 60:.1f}",
                ", ".join(map(str, comparison.epochs[name])),
            ]
            for name in names
        ],
    )
    defaults, config = dataclasses.asdict(RunConfig()), next(iter(configs.values()))
    varied = {field, "seed", *(["learning_rate"] if comparison.tunings else [])}
    flags = [
        f"{flag(name)} {value}"
        for name, value in dataclasses.asdict(config).items()
        if value != defaults[name] and name not in varied
    ]
    lines.append(f"Seeds {', '.join(map(str, comparison.seeds))}; {' '.join(flags) or 'default settings'}.")
    return "\n".join(lines) + "\n"


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    body = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return [title, "", *body, ""] if rows else []


def _cell(one: Estimate, form: str) -> str:
    if math.isnan(one.mean):
        return "did not learn"
    return f"{one.mean:{form}}" + (f" [{one.low:{form}}, {one.high:{form}}]" if one.low == one.low else "")


def _difference_cell(one: Difference) -> str:
    if one.identical:
        return "identical"
    return _cell(one, "+.4f") + (f" p {one.p:.2g}, {one.p_corrected:.2g}" if one.p == one.p else "")


def _score_cell(score: float) -> str:
    return "did not learn" if math.isnan(score) else f"{score:.4f}"


def _rate_cell(tuning: Any, rate: float) -> str:
    if rate not in tuning.scores:
        return ""
    score = "diverged" if math.isnan(tuning.scores[rate]) else f"{tuning.scores[rate]:.4f}"
    return (f"**{score}**" if rate == tuning.best else score) + f" ({tuning.epochs[rate]})"
