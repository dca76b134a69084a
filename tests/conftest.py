"""What several tests need: small real runs, on real digits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from dae import datasets, trainer
from dae.config import RunConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# Small enough for seconds, with a smaller last batch: 600 images are 9 batches of 64 and one of 24.
TINY = RunConfig(train_examples=600, validation_examples=256, batch_size=64, epochs=3)

# How many broken or hostile inputs each fuzz test tries.
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")), deadline=None)


@pytest.fixture(scope="session")
def mnist() -> datasets.Splits:
    return datasets.load(RunConfig())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of TINY."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    trainer.train(TINY, folder)
    return folder


def run_script(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a script of experiments/ as a user does, from `cwd`."""
    command = [sys.executable, str(EXPERIMENTS / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
