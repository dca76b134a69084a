"""Kill a run at random moments and resume it: `python experiments/benchmarks/kill_and_resume.py --kills 50`."""

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from dae import cli
from dae.config import RunConfig, to_json
from dae.errors import RunError

RUN_SCRIPT = Path(__file__).resolve().parent.parent / "run.py"
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


def main() -> None:
    arguments = cli.parse(KillAndResumeArguments)
    cli.import_tensorflow()
    from dae.analysis.reproducibility import first_difference
    from dae.replicas import local_tf_configs

    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(to_json(SMALL))

        def start(name: str, workers: int = 1) -> list[subprocess.Popen]:
            command = [sys.executable, str(RUN_SCRIPT), "--config", "config.json", "--run-dir", name, "--resume"]
            return [
                subprocess.Popen(
                    command,
                    cwd=scratch,
                    env={**os.environ, "TF_CONFIG": tf_config},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for tf_config in local_tf_configs(workers)
            ]

        def finish(name: str) -> None:
            (process,) = start(name)
            output, _ = process.communicate()
            if process.returncode != 0:
                raise RunError(f"a run exited with {process.returncode}: {output}")

        started = time.monotonic()
        finish("uninterrupted")
        duration = time.monotonic() - started
        kills, runs, bar = 0, 0, tqdm(total=arguments.kills, unit=" kills", disable=None)
        while kills < arguments.kills:
            runs += 1
            name = f"run-{runs}"
            while kills < arguments.kills and not (Path(scratch) / name / "report.json").exists():
                processes = start(name, moments.choice((1, arguments.workers)))
                killed = moments.choice(processes)
                try:
                    killed.communicate(timeout=moments.uniform(0, duration))
                except subprocess.TimeoutExpired:
                    killed.kill()
                    kills += 1
                    bar.update()
                for process in processes:
                    try:
                        output, _ = process.communicate(timeout=30)
                    except subprocess.TimeoutExpired:  # it still waits for the killed one to start
                        process.kill()
                        output, _ = process.communicate()
                    if process.returncode not in (0, -9) and (process is killed or process.returncode != 1):
                        raise RunError(f"run {runs}, after {kills} kills, exited with {process.returncode}: {output}")
            finish(name)
            difference = first_difference(Path(scratch) / "uninterrupted", Path(scratch) / name)
            if difference is not None:
                raise RunError(f"run {runs}, after {kills} kills in total, first differs at {difference}")
    print(f"{kills} kills in {runs} runs: every run ended identical, in every bit, to the uninterrupted run")


if __name__ == "__main__":
    cli.run(main)
