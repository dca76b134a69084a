"""Fixtures that several packages of tests share: MNIST and a small finished run."""

from pathlib import Path

import pytest
import tensorflow as tf
from helpers import TINY
from hypothesis import settings

from dae import runtime
from dae.config import RunConfig
from dae.data import datasets
from dae.training import trainer

runtime.select_devices(["cpu:0", "cpu:1", "cpu:2", "cpu:3"])  # for tests of several devices
runtime.resolve(TINY)  # sets the threads that run.py would choose
tf.constant(0)  # starts TensorFlow, so that no test can set others
settings.register_profile("dae", deadline=None)  # the time of an example depends on what else is running
settings.load_profile("dae")


@pytest.fixture(scope="session")
def mnist() -> datasets.Splits:
    return datasets.load(RunConfig())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of TINY."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    trainer.train(TINY, folder)
    return folder
