"""Kill a run at random moments and resume it: `python experiments/benchmarks/kill_and_resume.py --kills 50`."""

import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RUN_SCRIPT, start_workers
from tqdm import tqdm

from dae import cli
from dae.config import RunConfig, to_json
from dae.errors import RunError

SMALL = RunConfig(
    train_examples=640,
    validation_examples=256,
    batch_size=64,
    epochs=6,
    checkpoint_every=3,
    shards=2,
    intra_op_threads=1,
)


@dataclasses.dataclass(frozen=True)
class KillAndResumeArguments:
    """Kill a small run with SIGKILL at random moments, resume it, and compare the result with an uninterrupted run."""

    kills: int = 300
    """Number of kills; when the run finishes, it is compared and another one is started."""
    workers: int = 1
    """Each time, resume the run either in one process or on this many workers, of which one is killed."""
    seed: int = 0
    """Seed of the moments."""


def start(folder: Path, name: str, workers: int = 1) -> list[subprocess.Popen]:
    """Start or resume the run NAME in `folder`, which holds its config.json."""
    command = [sys.executable, RUN_SCRIPT, "--config", "config.json", "--run-dir", name, "--resume"]
    return start_workers(command, workers, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(folder: Path, name: str) -> None:
    """Start or resume a run and wait for its end. Raises RunError if it fails."""
    (process,) = start(folder, name)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise RunError(f"a run exited with {process.returncode}: {output}")


def kill(process: subprocess.Popen, processes: list[subprocess.Popen], timeout: float) -> bool:
    """Kill one of the processes after `timeout` seconds, and wait for all; return whether it had not ended before.

    Raises RunError if one has failed for another reason.
    """
    try:
        process.communicate(timeout=timeout)
        is_killed = False
    except subprocess.TimeoutExpired:
        process.kill()
        is_killed = True
    for worker in processes:
        try:
            output, _ = worker.communicate(timeout=30)
        except subprocess.TimeoutExpired:  # it still waits for the killed one to start
            worker.kill()
            output, _ = worker.communicate()
        # 1 is the status of a worker that has lost another one.
        if worker.returncode not in (0, -signal.SIGKILL) and (worker is process or worker.returncode != 1):
            raise RunError(f"a worker exited with {worker.returncode}: {output}")
    return is_killed


def main() -> None:
    arguments = cli.parse(KillAndResumeArguments)
    cli.import_tensorflow()
    from dae.analysis.reproducibility import first_difference

    moments, kills, runs = random.Random(arguments.seed), 0, 0
    bar = tqdm(total=arguments.kills, unit=" kills", disable=None)
    with tempfile.TemporaryDirectory() as scratch, bar:
        folder = Path(scratch)
        (folder / "config.json").write_text(to_json(SMALL))
        started = time.monotonic()
        finish(folder, "uninterrupted")
        duration = time.monotonic() - started
        while kills < arguments.kills:
            runs += 1
            name = f"run-{runs}"
            while kills < arguments.kills and not (folder / name / "report.json").exists():
                processes = start(folder, name, moments.choice((1, arguments.workers)))
                if kill(moments.choice(processes), processes, moments.uniform(0, duration)):
                    kills += 1
                    bar.update()
            finish(folder, name)
            difference = first_difference(folder / "uninterrupted", folder / name)
            if difference is not None:
                raise RunError(f"run {runs}, after {kills} kills in total, first differs at {difference}")
    print(f"{kills} kills in {runs} runs: every run ended identical, in every bit, to the uninterrupted run")


if __name__ == "__main__":
    cli.run(main)
