"""Helpers of the benchmarks: programs in separate processes, timing in turn, tables, and the timing environment."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dae import cli
from dae.config import RunConfig
from dae.errors import RunError, UsageError

T = TypeVar("T")
RUN_SCRIPT = str(Path(__file__).resolve().parent.parent / "run.py")


def start_workers(command: Sequence[str], workers: int = 1, **options: Any) -> list[subprocess.Popen]:
    """Start `command` once for each of several workers on this machine; `options` are those of Popen."""
    environment = options.pop("env", os.environ)
    return [
        subprocess.Popen(command, env={**environment, "TF_CONFIG": tf_config}, text=True, **options)
        for tf_config in (local_tf_configs(workers) if workers > 1 else [""])
    ]


def local_tf_configs(workers: int) -> list[str]:
    """Return the value of TF_CONFIG for each of several workers on this machine, with ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(workers)]
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]
    cluster = {"worker": addresses}
    return [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": n}}) for n in range(workers)]


class Program(contextlib.ExitStack):
    """A program of programs.py in a separate process, or in one for each worker; killed at the end of a `with`."""

    def __init__(self, name: str, config: RunConfig, workers: int = 1, checkout: str | None = None) -> None:
        """Prepare it, with the `dae` of a `checkout` of this repository, or else the one that is installed."""
        super().__init__()
        self._name, self._workers = name, workers
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.run = self._folder / "run"
        """Folder of its run, until the end of the `with`."""
        # Only what differs from the default, so that another version of dae understands it.
        settings = {
            field.name: value
            for field in dataclasses.fields(RunConfig)
            if (value := getattr(config, field.name)) != field.default
        }
        script = str(Path(__file__).with_name("programs.py"))
        self._command = [sys.executable, script, name, json.dumps(settings), str(self.run)]
        self._environment = {**os.environ, **({"PYTHONPATH": checkout} if checkout else {})}
        self._processes: list[subprocess.Popen] = []

    def epoch(self) -> dict[str, Any]:
        """Let it train one epoch; return what it reports. The first call starts it. Raises RunError if it stops."""
        for process in self._processes:
            process.stdin.write("continue\n")  # type: ignore[union-attr]
        if not self._processes:
            self._start()
        lines = [process.stdout.readline() for process in self._processes]  # type: ignore[union-attr]
        if not all(lines):
            log = (self._folder / "log").read_text(errors="replace").strip().splitlines()
            raise RunError(f"{self._name}: stopped; last line of its log: {log[-1] if log else '(empty)'}")
        return json.loads(lines[0])

    def finish(self) -> None:
        """Let it finish after its last epoch."""
        for process in self._processes:
            process.communicate("continue\n")

    def _start(self) -> None:
        with (self._folder / "log").open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "bufsize": 1}
            self._processes = start_workers(self._command, self._workers, env=self._environment, **pipes)
        for process in self._processes:
            self.callback(process.communicate)
            self.callback(process.kill)


def in_turn(functions: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call the functions in turn, `rounds` times after once for warm-up; return the later results of each.

    Raises UsageError if `rounds` is less than 1.
    """
    if rounds < 1:
        raise UsageError(f"--rounds: expected an integer >= 1, got {rounds}")
    results: dict[str, list[T]] = {name: [] for name in functions}
    for _ in tqdm(range(rounds + 1), unit=" rounds", disable=None):
        for name, function in functions.items():
            results[name].append(function())
    return {name: values[1:] for name, values in results.items()}


def epochs_in_turn(programs: Mapping[str, Program], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Start the programs, let them train in turn, and return what they report of each epoch but the first."""
    with contextlib.ExitStack() as stack:
        for program in programs.values():
            stack.enter_context(program)
        return in_turn({name: program.epoch for name, program in programs.items()}, rounds)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def save(path: Path, arguments: Any, results: Mapping[str, Any]) -> None:
    """Write results as JSON, with what timings depend on: date, machine, versions, command, arguments."""
    cli.import_tensorflow()
    from dae.workdir.workdir import environment

    peers = {"torch": version("torch")} if importlib.util.find_spec("torch") else {}
    known = {"date": date.today().isoformat(), "arguments": dataclasses.asdict(arguments), "peers": peers}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), **known, **results}, indent=2) + "\n", encoding="utf-8")
