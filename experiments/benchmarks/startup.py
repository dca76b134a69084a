"""Times how long run.py takes to answer: python experiments/start_up.py."""

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
class StartUpArguments:
    """Time, in turns, the help, the refusal of a mistyped flag, and the first training step of the default run."""

    rounds: int = 5
    """How many times each; one more goes before as warm-up."""


def until_exit(status: int, *command: str) -> float:
    """Seconds until `command` is over; raises RunError where it does not exit with `status`."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True)
    if done.returncode != status:
        raise RunError(f"{' '.join(command)} exited with {done.returncode}")
    return time.perf_counter() - started


def until_first_step() -> float:
    """Seconds until the default run has its first step done and, which tells it, saved."""
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
        while not (run / "checkpoints" / "newest" / "ckpt-1.index").exists():
            if process.poll() is not None:
                raise RunError(f"run.py exited with {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - started


def main() -> None:
    arguments = cli.parse(StartUpArguments)
    if arguments.rounds < 1:
        raise UsageError(f"--rounds: {arguments.rounds} is not a whole number from 1 up")
    timed = {
        "run.py --help": lambda: until_exit(0, *RUN, "--help"),
        "run.py --losss bce": lambda: until_exit(2, *RUN, "--losss", "bce"),
        "run.py, its first step": until_first_step,
        "importing TensorFlow alone": lambda: until_exit(0, sys.executable, "-c", "import tensorflow"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in tqdm(range(arguments.rounds + 1), unit=" rounds", disable=None):
        for name, function in timed.items():
            seconds[name].append(function())
    print("| until | seconds, median | from .. to |\n| --- | --- | --- |")
    for name, (_, *of_rounds) in seconds.items():
        print(f"| {name} | {statistics.median(of_rounds):.2f} | {min(of_rounds):.2f} to {max(of_rounds):.2f} |")


if __name__ == "__main__":
    cli.run(main)
