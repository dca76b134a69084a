"""Helpers of the tests: a small configuration, ways to run the scripts, and damage to files."""

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

from dae.config import RunConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# Trains in seconds, with a smaller last batch: 600 images are 9 batches of 64 and one of 24.
TINY = RunConfig(train_examples=600, validation_examples=256, batch_size=64, epochs=3)

# How many damaged or hostile inputs each fuzz test tries.
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")))


def run_subprocess(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of experiments/ as a user does, from `cwd`."""
    command = [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def run_in_process(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of experiments/ in this process, which saves six seconds for importing TensorFlow."""
    command, before = [str(EXPERIMENTS / script), *map(str, arguments)], os.getcwd()
    stdout, stderr = io.StringIO(), io.StringIO()
    os.chdir(cwd or before)
    try:
        with (
            mock.patch.object(sys, "argv", command),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as exit,
        ):
            runpy.run_path(command[0], run_name="__main__")
    finally:
        os.chdir(before)
    assert isinstance(exit.value.code, int)
    return subprocess.CompletedProcess(command, exit.value.code, stdout.getvalue(), stderr.getvalue())
