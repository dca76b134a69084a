"""Markdown tables and CSV files from rows, which map the names of columns to text, numbers or `Interval`s."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dae.evaluation.metrics import METRICS
from dae.files import atomic_path

# The heads of columns in tables, and the names of metrics in pictures.
TITLES = {name: name for name in METRICS} | {
    "bce": "BCE, nats per pixel",
    "bce_excess": "BCE excess",
    "mse": "MSE",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "test_images": "test images",
}


def cell(column: str, value: Any) -> str:
    """Return a value in a column of a table as text."""
    number_format = {"psnr": ".2f", "level": "g", "test_images": ","}.get(column, ".4f")
    return value if isinstance(value, str) else format(value, number_format)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table, which ends with an empty line, with the columns of the first of the `rows`."""
    columns = list(rows[0])
    lines = [[TITLES.get(name, name) for name in columns], ["---"] * len(columns)]
    lines += [[cell(name, row[name]) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line for each row, with the columns of the longest one; NaN is written as `nan`."""
    longest = max(rows, key=len)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(longest), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
