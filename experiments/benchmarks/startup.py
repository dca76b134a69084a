"""Time the start of run.py: `python experiments/benchmarks/startup.py`."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from dae import cli
from dae.errors import RunError, UsageError

RUN = (sys.executable, str(Path(__file__).resolve().parent.parent / "run.py"))


@dataclasses.dataclass(frozen=True)
class StartupArguments:
    """Time, in turn, the help, the error for a mistyped flag, and the first training step of the default run."""

    rounds: int = 5
    """Timed repetitions, after one for warm-up."""


def until_exit(status: int, *command: str) -> float:
    """Return the seconds until `command` exits. Raises RunError if its exit status is not `status`."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True)
    if done.returncode != status:
        raise RunError(f"{' '.join(command)} exited with {done.returncode}")
    return time.perf_counter() - started


def until_first_step() -> float:
    """Return the seconds until the default run has taken its first step, which a checkpoint shows."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        run = Path(scratch) / "run"
        started = time.perf_counter()
        process = subprocess.Popen(
            [*RUN, "--checkpoint-every", "1", "--run-dir", str(run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        while not (run / "checkpoints" / "latest" / "ckpt-1.index").exists():
            if process.poll() is not None:
                raise RunError(f"run.py exited with {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - started


def main() -> None:
    arguments = cli.parse(StartupArguments)
    if arguments.rounds < 1:
        raise UsageError(f"--rounds: expected a whole number >= 1, got {arguments.rounds}")
    timed = {
        "run.py --help": lambda: until_exit(0, *RUN, "--help"),
        "run.py --losss bce": lambda: until_exit(2, *RUN, "--losss", "bce"),
        "run.py until its first step": until_first_step,
        "only importing TensorFlow": lambda: until_exit(0, sys.executable, "-c", "import tensorflow"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in tqdm(range(arguments.rounds + 1), unit=" rounds", disable=None):
        for name, function in timed.items():
            seconds[name].append(function())
    print("| command | seconds, median | range |\n| --- | --- | --- |")
    for name, (_, *of_rounds) in seconds.items():
        print(f"| {name} | {statistics.median(of_rounds):.2f} | {min(of_rounds):.2f} to {max(of_rounds):.2f} |")


if __name__ == "__main__":
    cli.run(main)
