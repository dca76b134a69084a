"""What several tests need: small real runs, on real digits."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings

from dae import runtime
from dae.config import RunConfig
from dae.data import datasets
from dae.training import trainer

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# Small enough for seconds, with a smaller last batch: 600 images are 9 batches of 64 and one of 24.
TINY = RunConfig(train_examples=600, validation_examples=256, batch_size=64, epochs=3)

runtime.settle(TINY)  # before any test starts TensorFlow in its own way: with the threads that run.py would choose
settings.register_profile("dae", deadline=None)  # how long one example takes is a matter of what else runs
settings.load_profile("dae")
# How many broken or hostile inputs each fuzz test tries.
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")))


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


def run_here(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The same in this process, which has TensorFlow already: six seconds less."""
    command, before = [str(EXPERIMENTS / name), *map(str, arguments)], os.getcwd()
    said, complained = io.StringIO(), io.StringIO()
    os.chdir(cwd or before)
    try:
        with (
            mock.patch.object(sys, "argv", command),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(complained),
            pytest.raises(SystemExit) as leaving,
        ):
            runpy.run_path(command[0], run_name="__main__")
    finally:
        os.chdir(before)
    assert isinstance(leaving.value.code, int)
    return subprocess.CompletedProcess(command, leaving.value.code, said.getvalue(), complained.getvalue())
