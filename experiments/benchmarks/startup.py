"""Time the start of run.py: `python experiments/benchmarks/startup.py`."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RUN_SCRIPT, in_turn, table

from dae import cli
from dae.errors import RunError

RUN = (sys.executable, RUN_SCRIPT)


@dataclasses.dataclass(frozen=True)
class StartupArguments:
    """Time, in turn, the help, the error for a mistyped flag, and the first training step of the default run."""

    rounds: int = 5
    """Timed repetitions, after one for warm-up."""


def until_exit(status: int, *command: str) -> float:
    """Return the seconds until `command` exits. Raises RunError if its exit status is not `status`."""
    started = time.perf_counter()
    completed = subprocess.run(command, capture_output=True)
    if completed.returncode != status:
        raise RunError(f"{' '.join(command)} exited with {completed.returncode}")
    return time.perf_counter() - started


def until_first_step() -> float:
    """Return the seconds until the default run has taken its first step, which a checkpoint shows."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        run = Path(scratch) / "run"
        started = time.perf_counter()
        command = [*RUN, "--checkpoint-every", "1", "--run-dir", str(run)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        while not (run / "checkpoints" / "latest" / "ckpt-1.index").exists():
            if process.poll() is not None:
                raise RunError(f"run.py exited with {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - started


def main() -> None:
    arguments = cli.parse(StartupArguments)
    functions = {
        "run.py --help": lambda: until_exit(0, *RUN, "--help"),
        "run.py --losss bce": lambda: until_exit(2, *RUN, "--losss", "bce"),
        "run.py until its first step": until_first_step,
        "only importing TensorFlow": lambda: until_exit(0, sys.executable, "-c", "import tensorflow"),
    }
    seconds = in_turn(functions, arguments.rounds)
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        for name, values in seconds.items()
    ]
    print(table(["command", "seconds, median", "range"], rows))


if __name__ == "__main__":
    cli.run(main)
