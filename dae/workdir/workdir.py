"""A run's folder: its name, lock, configuration, code, metrics and report.

All files are written atomically, except that each epoch appends a line to metrics.jsonl, which a resume truncates.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dae import config as config_module
from dae import plugins
from dae.config import RunConfig, config_for_resume, flag, map_plugins
from dae.errors import UsageError, first_line
from dae.workdir.environment import environment
from dae.workdir.files import TEMPORARY, atomic_write

CONFIG, ENVIRONMENT, METRICS, REPORT = "config.json", "environment.json", "metrics.jsonl", "report.json"
CODE = "code"
# A file that is locked where folders cannot be.
LOCK = ".lock"


def slug(setting: str) -> str:
    """Return a setting as a folder name: `bce + 0.1*my_losses.py:my_loss` becomes `bce+0.1xmy_loss`."""
    return re.sub(r"[^\w.+-]+", "-", plugins.label(setting).replace(" ", "").replace("*", "x"))


def new_path(config: RunConfig) -> Path:
    """Return the path of a new folder in `runs/`, named after the data, the model and the loss."""
    data = config.dataset if config.data is None else Path(config.data).resolve().stem.removeprefix("python:")
    name = "-".join(slug(part) for part in (data, config.model, config.loss))
    return next(path for path in map(Path("runs").joinpath, plugins.numbered(name)) if not path.exists())


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder while it is locked, with the run's configuration."""

    path: Path
    config: RunConfig
    has_run: bool
    """Whether the folder already holds a run, which is then resumed."""
    is_longer: bool
    """Whether `config` asks for more epochs than that run was started with."""
    is_finished: bool
    """Whether that run has a report and needs no further epochs."""


@contextlib.contextmanager
def opened(run_dir: str | Path | None, config: RunConfig, resume: bool, lock: bool = True) -> Iterator[Workdir]:
    """Lock a run's folder, by default a new one in runs/, and yield it with the configuration to train with.

    Without `lock`, as for workers other than the chief, the folder is only read, and may be missing.

    If the folder holds a run, `resume` must be true, and `config_for_resume` returns the configuration. A missing
    folder is created, and removed again if it is still empty at the end, as after a user's mistake. Raises UsageError
    if another process has locked the folder, or if it cannot be written or holds files that are not a run's.
    """
    if run_dir is None and resume:
        raise UsageError("--resume: the run to resume is not given; add --run-dir")
    path = new_path(config) if run_dir is None else Path(run_dir)
    with _locked(path) if lock else contextlib.nullcontext():
        if not has_run(path):
            yield Workdir(path, config, has_run=False, is_longer=False, is_finished=False)
            return
        if not resume:
            raise UsageError(f"--run-dir: {path} already holds a run; choose another folder, or add --resume")
        saved = config_module.read(path / CONFIG)
        config = config_for_resume(saved, config, path)
        is_longer = config.epochs > saved.epochs
        is_finished = (path / REPORT).exists() and not is_longer
        yield Workdir(path, config, has_run=True, is_longer=is_longer, is_finished=is_finished)


def has_run(path: Path) -> bool:
    """Return whether `path` holds a run. Raises UsageError if it holds something else.

    A folder counts as empty if it contains only files that a starting run writes before config.json.
    """
    names = {entry.name for entry in path.iterdir()} - {LOCK} if path.exists() else set()
    before_config = {ENVIRONMENT, CODE} if ENVIRONMENT in names else set()
    if CONFIG not in names and not all(name in before_config or name.startswith(TEMPORARY) for name in names):
        raise UsageError(f"--run-dir: {path} holds files that are not a run's (no {CONFIG}); choose another folder")
    return CONFIG in names


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create the folder if it is missing, and lock it; the operating system unlocks it however this process ends."""
    if str(path) == "." or re.search(r"[][*?\\\n]", str(path)):
        # TensorFlow treats such paths as glob patterns, and could read or delete the files of other runs.
        raise UsageError(
            f"--run-dir: {str(path)!r} cannot name a run; choose a folder other than '.', without line breaks or any "
            "of []*?\\"
        )
    missing: list[Path] = []
    try:
        missing += [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        _remove_empty(missing)
        raise UsageError(f"--run-dir: {path} cannot be written ({first_line(error)})") from None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        stack.callback(_remove_empty, missing)  # while no other process can lock the folder
        try:
            _lock(path, descriptor, stack)
        except BlockingIOError:
            missing.clear()  # they are the other process's now
            raise UsageError(f"--run-dir: another process is using {path}; choose another folder, or wait") from None
        except OSError as error:
            raise UsageError(
                f"--run-dir: {path} cannot be locked ({error.strerror}); choose a folder on a file system with locks"
            ) from None
        yield


def _lock(path: Path, descriptor: int, stack: contextlib.ExitStack) -> None:
    """Lock the folder `path`, which is open as `descriptor`, until `stack` is closed.

    Raises BlockingIOError if another process has locked it, and another OSError if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        raise
    except OSError:  # as on NFS and some other file systems, which may lock files, but not folders
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        (path / LOCK).unlink()
        raise
    stack.callback(_remove_lock, path)


def _remove_lock(path: Path) -> None:
    """Remove the file LOCK from a folder without a run."""
    if not (path / CONFIG).exists():
        (path / LOCK).unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):  # not empty, or never made
            folder.rmdir()


def start(path: Path, config: RunConfig, sources: Mapping[str, str]) -> RunConfig:
    """Write environment.json, code/ and config.json. Raises UsageError if that is impossible.

    `sources` maps the names of further files for code/ to their content; no setting refers to them. Returns `config`
    with references to the copies in code/ in place of the user's files.
    """
    try:
        atomic_write(path / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
        return _write_config(path, config, sources)
    except OSError as error:
        raise UsageError(f"--run-dir: {path} cannot be written ({error.strerror})") from None


def reopen(path: Path, config: RunConfig) -> RunConfig:
    """Mark the run in `path` as unfinished, and record `config`, which may have more epochs than before.

    Warns if versions or the processor have changed since the run was started, because the last bits of its results may
    then differ. Returns `config` as `start` does.
    """
    before, now = read_environment(path), environment()
    for name in ("versions", "cpu"):
        if before[name] != now[name]:
            print(
                f"warning: {path}: {name} was {before[name]}, now {now[name]}; the last bits of results may differ",
                file=sys.stderr,
            )
    (path / REPORT).unlink(missing_ok=True)
    return _write_config(path, config, {})


def _write_config(path: Path, config: RunConfig, sources: Mapping[str, str]) -> RunConfig:
    """Copy the files that `config` refers to into code/, write config.json, and return `config` with the copies' paths.

    Also removes temporary files that a killed process has left.
    """
    for left_by_a_kill in path.rglob(f"{TEMPORARY}*"):
        left_by_a_kill.unlink()
    copies = {name: source.encode() for name, source in sources.items()}

    def copy(reference: plugins.Reference, field_name: str) -> plugins.Reference:
        files, file = reference.read(flag(field_name)), Path(reference.path)
        # A file that reads others is kept in a folder with these, so that all keep their names.
        for name in plugins.numbered(file.stem, suffix=file.suffix if len(files) == 1 else ""):
            placed = {name if len(files) == 1 else f"{name}/{each}": content for each, content in files.items()}
            if all(copies.get(place, content) == content for place, content in placed.items()):
                break
        copies.update(placed)
        return dataclasses.replace(reference, path=f"{CODE}/{next(iter(placed))}")

    stored = map_plugins(config, lambda name, text: plugins.substitute(text, lambda one: copy(one, name)))
    for name, content in copies.items():
        (path / CODE / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path / CODE / name, content)
    atomic_write(path / CONFIG, config_module.to_json(stored))
    return config_module.read(path / CONFIG)


def read_environment(path: Path) -> dict[str, Any]:
    """Return the environment.json of the run in `path`, which describes the process that started it.

    Raises UsageError if it is missing or damaged.
    """
    try:
        read = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
        return {name: read[name] for name in ("versions", "cpu")} | read
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path / ENVIRONMENT}: missing or damaged; restore it, or start another run") from None


def append_metrics(path: Path, line: Mapping[str, float]) -> None:
    """Append one epoch's line to metrics.jsonl and flush it to disk."""
    with open(path / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_metrics(path: Path, epochs: int) -> None:
    """Raise UsageError unless metrics.jsonl has a line for each of the first `epochs`, as a checkpoint after them."""
    try:
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines() if epochs else []
        found = [json.loads(line)["epoch"] for line in lines[:epochs]]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    if found != list(range(1, epochs + 1)):
        raise UsageError(
            f"{path / METRICS}: missing or damaged, without the lines of all {epochs} epochs of the checkpoint; "
            "restore it, or start another run"
        )


def truncate_metrics(path: Path, epochs: int) -> None:
    """Keep only the first `epochs` lines of metrics.jsonl; a killed run may have written more."""
    file = path / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    atomic_write(file, "".join(lines[:epochs]))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl, one per epoch."""
    return [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]


def write_report(path: Path, report: Mapping[str, float]) -> None:
    """Write report.json, which marks a run as finished."""
    atomic_write(path / REPORT, json.dumps(report, indent=2) + "\n")


def read_report(path: Path) -> dict[str, float]:
    """Return the report.json of a run. Raises UsageError if it is missing, as in an unfinished run, or damaged."""
    if not (path / REPORT).exists():
        raise UsageError(f"{path}: not a finished run (it has no {REPORT}); finish it with --resume")
    try:
        return json.loads((path / REPORT).read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path / REPORT}: damaged; delete it, and repeat run.py with --resume to write it") from None
