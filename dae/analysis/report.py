"""Markdown tables, CSV and JSON files, and pictures, all from plain rows.

A row maps the names of columns to text, numbers, None for an empty cell, or intervals.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dae.evaluation.metrics import METRICS
from dae.files import atomic_path


class Interval(NamedTuple):
    """A mean, and the ends of its confidence interval, which are NaN if it has none."""

    mean: float
    low: float = math.nan
    high: float = math.nan


# Of confidence intervals.
LEVEL = 0.95


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value per seed and its 95 % t-interval, whose ends are NaN for fewer than two values."""
    if len(values) < 2:
        return Interval(*values) if values else Interval(math.nan)
    from scipy import stats  # is not always installed, and not needed for a single seed

    mean, half_width = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, mean - half_width, mean + half_width)


Row = Mapping[str, Any]

# The heads of columns in tables, and the names of metrics in pictures.
TITLES = {name: name for name in METRICS} | {
    "bce": "BCE, nats per pixel",
    "bce_excess": "BCE excess",
    "mse": "MSE",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "test_images": "test images",
    "seconds_to_train": "s to train",
    "milliseconds_per_image": "ms per image",
}
# The formats of the numbers in columns, if not DECIMALS.
FORMATS = {"psnr": ".2f", "level": "g", "seconds_to_train": ".0f", "milliseconds_per_image": ".3g"}
DECIMALS = ".4f"


def format_value(value: Any, number_format: str = DECIMALS) -> str:
    """Return a value of a row as text: `17.72 [17.53, 17.91]` for an interval, nothing for None and NaN."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    mean, low, high = value if isinstance(value, Interval) else Interval(value)
    if math.isnan(mean):
        return ""
    ends = "" if math.isnan(low) else f" [{low:{number_format}}, {high:{number_format}}]"
    return f"{mean:{number_format}}{ends}"


def cell(row: Row, column: str) -> str:
    """Return the value in a column as text, in the format of the column."""
    return format_value(row.get(column), FORMATS.get(column, DECIMALS))


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table, which ends with an empty line, or an empty string if there are no rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [[TITLES.get(name, name) for name in columns], ["---"] * len(columns)]
    lines += [[cell(row, name) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a line for each row; an interval has the columns NAME and, if it has ends, NAME_low and NAME_high."""
    flat: list[dict[str, Any]] = []
    for row in rows:
        flat.append({})
        for name, value in row.items():
            mean, low, high = value if isinstance(value, Interval) else Interval(value)
            flat[-1] |= {name: mean} | ({} if math.isnan(low) else {f"{name}_low": low, f"{name}_high": high})
    columns = dict.fromkeys(name for row in sorted(flat, key=len, reverse=True) for name in row)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(without_nan(flat))


def without_nan(value: Any) -> Any:
    """Return `value` with None in place of NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
