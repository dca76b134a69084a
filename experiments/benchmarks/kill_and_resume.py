"""Kills a run at random moments, hundreds of times, and resumes it: python experiments/torture.py --kills 300."""

import dataclasses
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from dae import cli, config
from dae.config import RunConfig
from dae.errors import RunError

SMALL = RunConfig(
    train_examples=640, validation_examples=256, batch_size=64, epochs=6, checkpoint_every=3, intra_op_threads=2
)


@dataclasses.dataclass(frozen=True)
class TortureArguments:
    """Kill a small run with SIGKILL at random moments, resume it, and hold its end against a run left in peace."""

    kills: int = 300
    """How many times to kill; whenever the run comes to its end, it is compared, and another begun."""
    seed: int = 0
    """Decides the moments."""


def main() -> None:
    arguments = cli.parse(TortureArguments)
    cli.load_tensorflow(SMALL)
    from dae.analysis import reproducibility

    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(config.to_json(SMALL))

        def start(name: str) -> subprocess.Popen:
            script = Path(__file__).resolve().parent.parent / "run.py"
            command = [sys.executable, str(script), "--config", "config.json", "--run-dir", name, "--resume"]
            return subprocess.Popen(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def finish(name: str) -> None:
            process = start(name)
            said, _ = process.communicate()
            if process.returncode != 0:
                raise RunError(f"a run exited with {process.returncode}: {said}")

        started = time.monotonic()
        finish("peace")
        whole = time.monotonic() - started
        kills, runs, bar = 0, 0, tqdm(total=arguments.kills, unit=" kills", disable=None)
        while kills < arguments.kills:
            runs += 1
            name = f"run-{runs}"
            while kills < arguments.kills and not (Path(scratch) / name / "report.json").exists():
                process = start(name)
                try:
                    process.communicate(timeout=moments.uniform(0, whole))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    kills += 1
                    bar.update()
                if process.returncode not in (0, -9):
                    raise RunError(f"run {runs}, after {kills} kills, exited with {process.returncode}")
            finish(name)
            difference = reproducibility.first_difference(Path(scratch) / "peace", Path(scratch) / name)
            if difference is not None:
                raise RunError(f"run {runs}, after {kills} kills in all, differs: {difference}")
    print(f"{kills} kills in {runs} runs: every run ended in the same bits as the run left in peace")


if __name__ == "__main__":
    cli.run(main)
