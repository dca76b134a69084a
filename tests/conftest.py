"""Fixtures that several packages of tests share: MNIST, users' files and small finished runs."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf
from helpers import EIGHT_BITS, TINY
from runs import config_of, write_files

from dae import runtime
from dae.config import RunConfig
from dae.data import datasets
from dae.models import networks
from dae.training import trainer
from dae.workdir.model_files import save_model

runtime.select_devices(["cpu:0", "cpu:1", "cpu:2", "cpu:3"])  # for tests of several devices
runtime.resolve(TINY)  # sets the threads that run.py would choose
tf.constant(0)  # starts TensorFlow, so that no test can set others


@pytest.fixture(scope="session")
def mnist() -> datasets.Splits:
    return datasets.load(RunConfig())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of TINY."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    trainer.train(TINY, folder)
    return folder


@pytest.fixture(scope="session")
def files(mnist: datasets.Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the rows of runs.py name."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, mnist.test.pixels)
    save_model(networks.build(config_of(folder, seed=7), (16, 16, 1)), folder / "start.keras", EIGHT_BITS)
    return folder


@pytest.fixture(scope="session")
def finished_run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of the finished, uninterrupted run of a row, which it trains only once."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.cache
    def train(name: str) -> Path:
        trainer.train(config_of(files, name), folder / name, quiet=True)
        return folder / name

    return train
