"""Fixtures that several packages of tests share: MNIST, users' files and small finished runs."""

import contextlib
import fcntl
import functools
from collections.abc import Callable, Iterator
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

# For tests of several devices.
(_cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
runtime.resolve(TINY)  # sets the threads that run.py would choose
tf.constant(0)  # starts TensorFlow, so that no test can set others


@pytest.fixture(scope="session")
def mnist() -> datasets.Splits:
    return datasets.load(RunConfig())


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all test processes share; what is in it must not be changed."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def made_once(folder: Path, last: str) -> Iterator[bool]:
    """Yield whether `folder` must be made, which is so until it has the file `last`; other processes wait for it."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not (folder / last).exists()


@pytest.fixture(scope="session")
def tiny_run(shared: Path) -> Path:
    """A finished run of TINY, alone in its folder."""
    folder = shared / "runs" / "tiny"
    with made_once(folder.parent, "tiny/report.json") as is_missing:
        if is_missing:
            trainer.train(TINY, folder)
    return folder


@pytest.fixture(scope="session")
def files(mnist: datasets.Splits, shared: Path) -> Path:
    """A folder with the files that the rows of runs.py name."""
    folder = shared / "files"
    with made_once(folder, "start.keras") as is_missing:
        if is_missing:
            write_files(folder, mnist.test.pixels)
            save_model(networks.build(config_of(folder, seed=7), (16, 16, 1)), folder / "start.keras", EIGHT_BITS)
    return folder


@pytest.fixture(scope="session")
def finished_run(files: Path, shared: Path) -> Callable[[str], Path]:
    """A function that returns the folder of the finished, uninterrupted run of a row, which is trained only once."""

    @functools.cache
    def train(name: str) -> Path:
        folder = shared / name
        with made_once(folder, "report.json") as is_missing:
            if is_missing:
                trainer.train(config_of(files, name), folder, quiet=True)
        return folder

    return train
