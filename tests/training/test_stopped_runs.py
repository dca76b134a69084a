"""A run that was stopped can be used, finished early, and continued."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import run_in_process
from runs import config_of

import dae
from dae.analysis.reproducibility import first_difference
from dae.errors import RunError, UsageError
from dae.training import trainer
from dae.training.checkpoints import saved_in
from dae.training.task import prepare
from dae.workdir.workdir import read_report


class Stopped(Exception):
    """Raised in the place of a signal, at the end of an epoch."""


def train_one_epoch(config: dae.RunConfig, folder: Path, resume: bool = False) -> None:
    """Train until the callback of the first epoch fails, while a signal is pending that does not replace its error."""

    def stop(epoch_end):
        os.kill(os.getpid(), signal.SIGTERM)
        raise Stopped

    with pytest.raises(Stopped):
        trainer.train(config, folder, quiet=True, on_epoch_end=stop, resume=resume)


@pytest.fixture(scope="module")
def stopped_run(files, tmp_path_factory) -> Path:
    """A run of the row `plain`, after one of its two epochs."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train_one_epoch(config_of(files, "plain"), folder)
    return folder


@pytest.fixture
def run(stopped_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def weights(path: Path) -> list[np.ndarray]:
    return dae.load_model(path).get_weights()


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_an_unfinished_run_is_used_with_its_checkpoint_finished_early_and_continued(run, finished_run, files, capsys):
    config = config_of(files, "plain")
    stopped = weights(run)
    assert f"warning: {run} is not finished: using its checkpoint {run}/checkpoints/best/" in capsys.readouterr().err
    assert same(prepare(config_of(files, start_from=str(run))).model.get_weights(), stopped)

    report = trainer.train(config, run, resume=True, finish=True, quiet=True)
    assert (report["epochs"], report["epoch"]) == (1, 1)
    assert same(weights(run), stopped)
    assert f"{run}: using the model of its report, after 1 of 2 epochs" in capsys.readouterr().err
    done = run_in_process("verify.py", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "identical in every bit" in done.stdout

    trainer.train(config, run, resume=True, quiet=True)
    assert read_report(run)["epochs"] == 2
    assert first_difference(run, finished_run("plain")) is None


@pytest.mark.slow
def test_an_unfinished_run_without_validation_is_used_with_the_average_of_its_latest_weights(files, tmp_path, capsys):
    config, run = config_of(files, ema_decay=0.6, validation_examples=0), tmp_path / "run"
    train_one_epoch(config, run)
    stopped = weights(run)
    assert f"using its checkpoint {run}/checkpoints/latest/" in capsys.readouterr().err
    trainer.train(config, run, resume=True, finish=True, quiet=True)
    assert same(weights(run), stopped)


def test_a_finished_run_that_is_extended_by_mistake_keeps_its_report_and_model(finished_run, files, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run("pairs"), run)
    before, report = weights(run), read_report(run)
    longer = config_of(files, "pairs", epochs=1000)
    train_one_epoch(longer, run, resume=True)
    assert (read_report(run), same(weights(run), before)) == (report, True)
    assert f"after {report['epochs']} of 1000 epochs" in capsys.readouterr().err
    done = run_in_process("verify.py", run)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has been trained further than its report" in done.stderr
    assert trainer.train(config_of(files, "pairs"), run, resume=True, quiet=True) == report  # finished, as before


def test_a_damaged_best_checkpoint_of_an_unfinished_run_is_skipped(run, capsys):
    expected = weights(run)
    for file in (run / "checkpoints/best").glob("*.data*"):
        file.write_bytes(b"")
    assert same(weights(run), expected)  # of the only epoch
    assert "is damaged and skipped" in capsys.readouterr().err


def test_what_cannot_be_finished_is_rejected(run, files, tmp_path):
    config = config_of(files, "plain")
    with pytest.raises(UsageError, match=r"--finish: .* holds no run"):
        trainer.train(config, tmp_path / "none", resume=True, finish=True, quiet=True)
    (end,) = saved_in(run / "checkpoints/latest")[-1:]
    for file in end.parent.glob(f"{end.name}.*"):  # as if it had stopped within the first epoch
        file.unlink()
    with pytest.raises(UsageError, match=r"--finish: .* has no checkpoint of a whole epoch"):
        trainer.train(config, run, resume=True, finish=True, quiet=True)


@pytest.mark.parametrize(
    "happens", ["replaced", *(pytest.param(name, marks=pytest.mark.slow) for name in ("renamed", "deleted"))]
)
def test_a_run_whose_folder_is_another_one_stops_and_writes_nothing(happens, files, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def change(epoch_end):
        run.rename(moved)
        if happens == "deleted":
            shutil.rmtree(moved)
        elif happens == "replaced":
            run.mkdir()

    with pytest.raises(RunError, match=f"^--run-dir: {run} was renamed, deleted or replaced during the run"):
        trainer.train(config_of(files, epochs=2), run, quiet=True, on_epoch_end=change)
    assert not run.exists() or not list(run.iterdir())
    assert happens == "deleted" or dae.load_model(moved)
