"""The folder that a run writes: its name, who may write to it, and its small files.

Small files are written whole or not at all: to a temporary name, flushed to disk, then renamed. Only metrics.jsonl
is appended to, and cut back to what is whole by a resume.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dae import config as configs
from dae import plugins, runtime
from dae.config import RunConfig
from dae.errors import UsageError

CONFIG, ENVIRONMENT, METRICS, REPORT = "config.json", "environment.json", "metrics.jsonl", "report.json"
CODE = "code"


def new(config: RunConfig) -> Path:
    """Makes a folder of a readable name under `runs/` that nothing has yet, and returns its path."""
    data = config.dataset if config.data is None else Path(config.data).resolve().stem
    name = "-".join(readable(part) for part in (data, config.model, config.loss))
    path, number = Path("runs") / name, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = path.with_name(f"{name}-{number}")
        except OSError as error:
            raise UsageError(f"--run-dir: {path.resolve()} cannot be written ({error.strerror})") from None


def readable(setting: str) -> str:
    """A setting as a name for a folder: `bce + 0.1*my_losses.py:my_loss` is `bce+0.1xmy_loss`."""
    return re.sub(r"[^\w.+-]+", "-", plugins.label(setting).replace(" ", "").replace("*", "x"))


def has_run(path: Path) -> bool:
    """Whether `path` holds a run; raises UsageError where it holds something else.

    An empty folder is nothing, and so is what a kill leaves that comes before config.json is written.
    """
    if str(path) == "." or re.search(r"[][*?\\\n]", str(path)):
        # TensorFlow takes a path for a pattern, and would read or delete the files of other runs by it.
        raise UsageError(f"--run-dir: {str(path)!r} is not a name for a run; it may not have any of []*?\\")
    try:
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise UsageError(f"--run-dir: {path} is no folder for a run ({error.strerror})") from None
    before_config = {ENVIRONMENT, CODE} if ENVIRONMENT in names else set()
    if CONFIG not in names and not all(name in before_config or name.startswith(".partial") for name in names):
        raise UsageError(f"--run-dir: {path} holds something else than a run; name another")
    return CONFIG in names


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Makes the folder if need be and holds it alone; the system frees it when this process ends, however it ends.

    Raises UsageError where another process holds it or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"--run-dir: {path} cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--run-dir: another process is working on {path}") from None
        yield
    finally:
        os.close(folder)


def start(path: Path, config: RunConfig, sources: Mapping[str, str]) -> RunConfig:
    """Writes environment.json, code/ and config.json; raises UsageError where that cannot be.

    `sources` are further files for code/, for a reader. Returns `config` with the files of the user's own that it names
    replaced by the copies in code/.
    """
    try:
        write(path / ENVIRONMENT, json.dumps(runtime.environment(), indent=2) + "\n")
        return _write_config(path, config, sources)
    except OSError as error:
        raise UsageError(f"--run-dir: {path} cannot be written ({error.strerror})") from None


def reopen(path: Path, config: RunConfig) -> RunConfig:
    """Makes the run in `path` an unfinished one with `config`, which may ask for more epochs than before.

    Warns where other versions or another processor than it was begun with may give it other last bits.
    """
    begun, now = read_environment(path), runtime.environment()
    for name in ("versions", "cpu"):
        if begun[name] != now[name]:
            print(
                f"warning: {path} was begun with {name} {begun[name]}, now {now[name]}: the bits may differ",
                file=sys.stderr,
            )
    (path / REPORT).unlink(missing_ok=True)
    return _write_config(path, config, {})


def read_environment(path: Path) -> dict[str, Any]:
    """The environment.json of the run in `path`: what it was begun with."""
    return json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))


def _write_config(path: Path, config: RunConfig, sources: Mapping[str, str]) -> RunConfig:
    """Writes config.json, and first to code/ the files that it names; returns `config` with those in their place."""
    for left_by_a_kill in path.rglob(".partial-*"):
        left_by_a_kill.unlink()
    kept = {name: source.encode() for name, source in sources.items()}

    def keep(reference: plugins.Reference, flag: str) -> plugins.Reference:
        content, file = reference.read(flag), Path(reference.path)
        names = itertools.chain([file.name], (f"{file.stem}-{number}.py" for number in itertools.count(2)))
        name = next(name for name in names if kept.setdefault(name, content) == content)
        return dataclasses.replace(reference, path=f"{CODE}/{name}")

    stored = configs.with_code(
        config, lambda name, text: plugins.substitute(text, lambda one: keep(one, configs.flag(name)))
    )
    for name, content in kept.items():
        (path / CODE).mkdir(exist_ok=True)
        write(path / CODE / name, content)
    write(path / CONFIG, configs.to_json(stored))
    return configs.read(path / CONFIG)


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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]


def write_report(path: Path, report: dict[str, float]) -> None:
    """Writes the run's report.json, the sign that it is finished."""
    write(path / REPORT, json.dumps(report, indent=2) + "\n")


def check_finished(path: Path) -> None:
    """Raises UsageError unless `path` is the folder of a finished run."""
    if not (path / REPORT).exists():
        raise UsageError(f"{path}: not a finished run (it has no {REPORT}); finish it with --resume")


def read_report(path: Path) -> dict[str, float]:
    """The report.json of a finished run; raises UsageError where it is damaged."""
    try:
        return json.loads((path / REPORT).read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path / REPORT}: damaged; delete it and repeat with --resume to write it again") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, of the same suffix, which becomes `path` at once when the block ends well."""
    # Of this process alone; and without the file's name, which might say that it is an event file of TensorBoard's.
    temporary = path.with_name(f".partial-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_output(path: Path, suffixes: tuple[str, ...], flag: str) -> None:
    """Raises UsageError, before any work is done, where a file of the user's choice could not be written."""
    if path.suffix not in suffixes or path.is_dir():
        raise UsageError(f"{flag}: {path} is not the name of a {' or '.join(suffixes)} file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag}: {path.parent.resolve()} is not a folder that can be written")
