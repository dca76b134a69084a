"""The folder that a run writes: its name, its small files, and what made it.

Small files are written whole or not at all: to a temporary name, flushed to disk, then renamed.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf

from dae import config as configs
from dae.config import RunConfig
from dae.errors import UsageError

CONFIG, ENVIRONMENT, METRICS, REPORT = "config.json", "environment.json", "metrics.jsonl", "report.json"


def new_name(config: RunConfig) -> Path:
    """A readable path under `runs/` of the current folder that nothing has yet."""
    name = f"{config.dataset if config.data is None else Path(config.data).stem}-{config.model}-{config.loss}"
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def check_free(path: Path) -> None:
    """Raises UsageError where there is something at `path` already, be it a run or not; an empty folder is free."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"--run-dir: {path} exists already; name another, or add --resume to go on with it")


def start(path: Path, config: RunConfig) -> None:
    """Makes the folder, with environment.json and config.json; raises UsageError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write(path / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
        write(path / CONFIG, configs.to_json(config))
    except OSError as error:
        raise UsageError(f"--run-dir: {path} cannot be written ({error.strerror})") from None


def reopen(path: Path, config: RunConfig) -> None:
    """Makes the run in `path` an unfinished one with `config`, which may ask for more epochs than before."""
    (path / REPORT).unlink(missing_ok=True)
    write(path / CONFIG, configs.to_json(config))


def append_metrics(path: Path, line: dict[str, float]) -> None:
    """Appends one epoch's line to the run's metrics.jsonl, flushed to disk."""
    with open(path / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_epochs(path: Path, count: int) -> None:
    """Drops from the run's metrics.jsonl what a killed run wrote after its first `count` epochs."""
    file = path / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    write(file, "".join(lines[:count]))


def write_report(path: Path, report: dict[str, float]) -> None:
    """Writes the run's report.json, the sign that it is finished."""
    write(path / REPORT, json.dumps(report, indent=2) + "\n")


def read_report(path: Path) -> dict[str, float]:
    """The report.json of a finished run."""
    return json.loads((path / REPORT).read_text(encoding="utf-8"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, of the same suffix, which becomes `path` at once when the block ends well."""
    temporary = path.with_name(f".partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """What beside the configuration made a result: versions, source, command line and machine."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dae", "tensorflow", "keras", "numpy")},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": _git("status", "--porcelain", "--untracked-files=no", read=str.splitlines),
        "command": [sys.executable, *sys.argv],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": [device.name for device in tf.config.list_physical_devices("GPU")],
        "onednn": os.environ["TF_ENABLE_ONEDNN_OPTS"],
    }


def _git(*arguments: str, read: Callable[[str], Any] = str.strip) -> Any:
    """What git says of the checkout that holds the running script; None where there is no git or no checkout."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read(done.stdout) if done.returncode == 0 else None


def _cpu_name() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
