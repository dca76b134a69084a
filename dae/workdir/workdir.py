"""A run's folder: its name, lock, configuration, code, metrics and report.

All files are written atomically, except that each epoch appends a line to metrics.jsonl, which a resume truncates.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf

import dae
from dae import config as config_module
from dae import plugins, resolved
from dae.config import PLUGIN_FIELDS, RunConfig, config_for_resume, flag, to_json
from dae.errors import RunError, UsageError, as_usage_error, first_line, warn
from dae.files import TEMPORARY, atomic_write, check_utf8
from dae.resolved import Resolved
from dae.runtime import cores, cpu_name

CONFIG, ENVIRONMENT, METRICS, REPORT = "config.json", "environment.json", "metrics.jsonl", "report.json"
CODE, LOCK = "code", ".lock"


def slug(setting: str) -> str:
    """Return a setting as a folder name: `bce + 0.1*my_losses.py:my_loss` becomes `bce+0.1xmy_loss`."""
    return re.sub(r"[^\w.+-]+", "-", plugins.label(setting).replace(" ", "").replace("*", "x"))


def new_path(config: RunConfig) -> Path:
    """Return the path of a new folder in `runs/`, named after the data, the model and the loss."""
    path = config.data or config.clean
    data = config.dataset if path is None else Path(path).resolve().stem.removeprefix("python:")
    name = "-".join(slug(part) for part in (data, config.model, config.loss))
    return next(path for path in map(Path("runs").joinpath, plugins.numbered(name)) if not path.exists())


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder while it is locked, with the run's configuration."""

    path: Path
    output: Path
    """The folder to write to: `path`, or for workers other than the chief a temporary one."""
    config: RunConfig
    recorded: Resolved | None = None
    """The record of the run in the folder, which is then resumed; None if there is no run yet."""
    is_longer: bool = False
    """True if `config` asks for more epochs than that run was started with."""
    report: dict[str, Any] | None = None
    """The report of that run if it needs no further epochs."""
    check: Callable[[], None] = dataclasses.field(default=lambda: None, compare=False)
    """A function that raises RunError if `path` is no longer the folder that was locked."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Create the folder `path` if it is missing, and keep other processes out of it during the block.

    Yields a function that raises RunError if the folder has since been renamed, deleted or replaced: another run could
    then have its name.

    This locks a file in it, LOCK, because network file systems cannot lock folders; the operating system unlocks it
    however this process ends. After the block, LOCK is removed, and then those of the created folders that are empty,
    as after a user's mistake. Raises UsageError if another process has locked the folder, if it cannot be written or
    locked, or if TensorFlow cannot use its name.
    """
    if str(path) == "." or re.search(r"[][*?\\\n\0]", str(path)):
        # TensorFlow treats such paths as glob patterns, and could read or delete the files of other runs.
        allowed = "choose a folder other than '.', without line breaks or any of []*?\\"
        raise UsageError(f"--run-dir: {str(path)!r} cannot name a run; {allowed}")
    with contextlib.ExitStack() as stack:
        try:
            for folder in (*reversed(path.parents), path):
                if not folder.exists():
                    stack.callback(_remove_if_empty, folder)
            path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path / LOCK, "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # the process that had locked it has just removed it
                raise BlockingIOError
        except BlockingIOError:
            raise UsageError(f"--run-dir: another process is using {path}; choose another folder, or wait") from None
        except OSError as error:
            raise UsageError(f"--run-dir: {path} cannot be written or locked ({first_line(error)})") from None

        def check() -> None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path / LOCK), os.fstat(file.fileno())):
                    return
            raise RunError(
                f"--run-dir: {path} was renamed, deleted or replaced during the run, and nothing more was written; "
                "if it was renamed, continue with --resume and its new name"
            )

        def unlock() -> None:
            with contextlib.suppress(RunError):  # the lock of another run stays
                check()
                (path / LOCK).unlink()

        stack.callback(unlock)
        yield check


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def opened(run_dir: str | Path | None, config: RunConfig, resume: bool, is_chief: bool = True) -> Iterator[Workdir]:
    """Lock a run's folder, by default a new one in runs/, and yield it with the configuration to train with.

    Workers other than the chief only read the folder, which may be missing, and write to a temporary one.

    If the folder holds a run, `resume` must be true, and `config_for_resume` returns the configuration. A missing
    folder is created, and removed again if it is still empty at the end, as after a user's mistake. Raises UsageError
    if another process has locked the folder, or if it cannot be written or holds files that are not a run's.
    """
    if run_dir is None and resume:
        raise UsageError("--resume: the run to resume is not given; add --run-dir")
    path = new_path(config) if run_dir is None else Path(run_dir).expanduser()
    check_utf8(path)
    with contextlib.ExitStack() as stack:
        if is_chief:
            run = Workdir(path, path, config, check=stack.enter_context(locked(path)))
        else:
            run = Workdir(path, Path(stack.enter_context(tempfile.TemporaryDirectory())), config)
        if has_run(path):
            if not resume:
                raise UsageError(f"--run-dir: {path} already holds a run; choose another folder, or add --resume")
            saved = config_module.read(path / CONFIG)
            if config.epochs < saved.epochs and finished_report(path, config) is not None:
                saved = dataclasses.replace(saved, epochs=config.epochs)  # then trained further
            config, is_longer = config_for_resume(saved, config, path), config.epochs > saved.epochs
            report = finished_report(path, config)
            run = Workdir(path, run.output, config, resolved.read(path), is_longer, report, run.check)
        yield run


def has_run(path: Path) -> bool:
    """Return whether `path` holds a run. Raises UsageError if it holds something else.

    A folder counts as empty if it contains only files that a starting run writes before config.json.
    """
    names = {entry.name for entry in path.iterdir()} - {LOCK} if path.exists() else set()
    before_config = {ENVIRONMENT, resolved.FILE, CODE} if ENVIRONMENT in names else set()
    if CONFIG not in names and not all(name in before_config or name.startswith(TEMPORARY) for name in names):
        raise UsageError(f"--run-dir: {path} holds files that are not a run's (no {CONFIG}); choose another folder")
    return CONFIG in names


def start(path: Path, config: RunConfig, derived: Resolved) -> None:
    """Write environment.json, resolved.json, code/ and config.json, in this order."""
    atomic_write(path / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    atomic_write(path / resolved.FILE, resolved.to_json(derived))
    _write_config(path, config)


def reopen(path: Path, config: RunConfig, epochs: int) -> None:
    """Record `config`, which may ask for more than the `epochs` done so far, in the run in `path`.

    A report and model files of fewer epochs stay until the run has others.

    Raises UsageError, before anything is changed, if a file of the run is damaged. Warns if versions or the processor
    have changed since the run was started, because the last bits of its results may then differ.
    """
    before, now = read_environment(path), environment()
    truncate_metrics(path, epochs)
    for name in ("versions", "cpu"):
        if before[name] != now[name]:
            warn(f"{path}: {name} was {before[name]}, now {now[name]}; the last bits of results may differ")
    _write_config(path, config)


def _write_config(path: Path, config: RunConfig) -> None:
    """Write config.json, with copies of the users' files that it names in code/, and remove what a kill has left."""
    for left_by_a_kill in path.rglob(f"{TEMPORARY}*"):
        left_by_a_kill.unlink()
    values = (getattr(config, name) for name in PLUGIN_FIELDS)
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    copies = {name: source.encode() for name, source in plugins.sources(texts).items()}

    def copy(reference: plugins.Reference, field_name: str) -> plugins.Reference:
        files, file = reference.read(flag(field_name)), Path(reference.path)
        # A file that reads others is kept in a folder with these, so that all keep their names.
        for name in plugins.numbered(file.stem, suffix=file.suffix if len(files) == 1 else ""):
            placed = {name if len(files) == 1 else f"{name}/{member}": content for member, content in files.items()}
            if all(copies.get(target, content) == content for target, content in placed.items()):
                break
        copies.update(placed)
        return dataclasses.replace(reference, path=f"{CODE}/{next(iter(placed))}")

    text = to_json(config, lambda name, text: plugins.substitute(text, lambda reference: copy(reference, name)))
    for name, content in copies.items():
        (path / CODE / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path / CODE / name, content)
    atomic_write(path / CONFIG, text)


def environment() -> dict[str, Any]:
    """Describe this process and the package that it runs, for a run's environment.json."""
    is_checkout = _git("ls-files", "--error-unmatch", __file__) is not None
    changed = _git("status", "--porcelain", "--untracked-files=no") if is_checkout else None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "dae": dae.__version__}
        | {name: version(name) for name in ("tensorflow", "keras", "numpy")},
        "git_commit": _git("rev-parse", "HEAD") if is_checkout else None,
        "git_changed_files": None if changed is None else changed.splitlines(),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": cores(),
        "gpus": [
            tf.config.experimental.get_device_details(device).get("device_name", device.name)
            for device in tf.config.get_visible_devices("GPU")
        ],
    }


def _git(*arguments: str) -> str | None:
    """Ask git in the folder of this package; None without git or outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_environment(path: Path) -> dict[str, Any]:
    """Return the environment.json of the run in `path`, which describes the process that started it.

    Raises UsageError if it is missing or damaged.
    """
    problem = "missing or damaged; restore it, or start another run"
    with as_usage_error(path / ENVIRONMENT, problem, OSError, ValueError, KeyError, TypeError):
        read = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
        return read | {name: read[name] for name in ("versions", "cpu")}


def append_metrics(path: Path, line: Mapping[str, float]) -> None:
    """Append one epoch's line to metrics.jsonl and flush it to disk."""
    with open(path / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def truncate_metrics(path: Path, epochs: int) -> None:
    """Keep only the first `epochs` lines of metrics.jsonl, those of a checkpoint; a killed run may have written more.

    Raises UsageError if one of them is missing or damaged.
    """
    lines: list[str] = []
    problem = f"missing or damaged, without the lines of all {epochs} epochs of the checkpoint; restore it"
    with as_usage_error(path / METRICS, problem, OSError, ValueError, KeyError, TypeError):
        if epochs:
            lines = (path / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)[:epochs]
        if [json.loads(line)["epoch"] for line in lines] != list(range(1, epochs + 1)):
            raise ValueError("it has other lines")
    atomic_write(path / METRICS, "".join(lines))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl, one per epoch; none before the end of the first epoch."""
    file = path / METRICS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write report.json, which marks a run as finished."""
    atomic_write(path / REPORT, json.dumps(report, indent=2) + "\n")


def finished_report(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the report of the run in `path` if it is of all epochs that `config` asks for, else None.

    A run that is trained further keeps the report of fewer epochs.
    """
    report = read_report(path) if (path / REPORT).exists() else {}
    return report if report.get("epochs", 0) >= config.epochs else None


def read_report(path: Path) -> dict[str, Any]:
    """Return the report.json of a run. Raises UsageError if it is missing, as in an unfinished run, or damaged."""
    if not (path / REPORT).exists():
        raise UsageError(f"{path}: not a finished run (it has no {REPORT}); finish it with --resume")
    problem = "damaged; delete it, and repeat run.py with --resume to write it"
    with as_usage_error(path / REPORT, problem, ValueError):
        return json.loads((path / REPORT).read_text(encoding="utf-8"))
