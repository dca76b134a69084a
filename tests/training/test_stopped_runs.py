"""Signals, and runs that were stopped: they can be used, finished early, and continued."""

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import run_in_process
from runs import config_of

import dae
from dae.analysis.reproducibility import first_difference
from dae.errors import Interrupted, RunError, UsageError
from dae.training import trainer
from dae.training.checkpoints import saved_in
from dae.training.interruption import STOPPING, Interruption
from dae.training.task import prepare
from dae.workdir.workdir import read_metrics, read_report


@pytest.fixture(autouse=True)
def not_ignored():
    """Do not ignore SIGHUP, as a process under nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_waits_until_the_loop_asks_and_is_raised_after_the_state_was_saved(number):
    saved, handlers = [], [signal.getsignal(stopping) for stopping in STOPPING]
    with Interruption() as interruption:
        interruption.raise_if_pending("step 1", save=lambda: saved.append("too early"))
        send(number)
        with pytest.raises(Interrupted, match=r"^stopped and saved after step 2$") as caught:
            interruption.raise_if_pending("step 2", save=lambda: saved.append("saved"))
    assert caught.value.signal_number == number
    assert saved == ["saved"]
    assert [signal.getsignal(stopping) for stopping in STOPPING] == handlers


def test_a_second_sigint_interrupts_at_once_and_the_first_signal_counts():
    with Interruption() as interruption:
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            interruption.raise_if_pending("step 1")
    assert caught.value.signal_number == signal.SIGTERM


def test_sighup_stays_ignored_under_nohup_but_sigint_of_a_job_in_the_background_counts():
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with Interruption() as interruption:
            send(signal.SIGHUP)
            interruption.raise_if_pending("step 1")
            send(signal.SIGINT)
            with pytest.raises(Interrupted):
                interruption.raise_if_pending("step 2")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_than_the_main_one_sets_no_handlers():
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Interruption() as interruption:
            interruption.raise_if_pending("step 1")
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handler]


class Stopped(Exception):
    """Raised by a callback at the end of an epoch."""


def train_one_epoch(config: dae.RunConfig, folder: Path, resume: bool = False) -> None:
    """Train until the callback of the first epoch fails, while a signal is pending that does not replace its error."""

    def stop(epoch_end):
        os.kill(os.getpid(), signal.SIGTERM)
        raise Stopped

    with pytest.raises(Stopped):
        trainer.train(config, folder, quiet=True, on_epoch_end=stop, resume=resume)


@pytest.fixture(scope="module")
def stopped_run(files, tmp_path_factory) -> Path:
    """A run of the row `plain`, which had a signal in the callback of the first of its two epochs."""
    run, seen = tmp_path_factory.mktemp("stopped") / "run", []

    def interrupt(epoch_end: trainer.EpochEnd) -> None:
        seen.append((epoch_end.values, epoch_end.step, saved_in(run / "checkpoints" / "latest")[-1].name))
        os.kill(os.getpid(), signal.SIGINT)

    hint = r"continue with dae.train\(config, '.*/run', resume=True\)"
    with pytest.raises(KeyboardInterrupt, match=rf"epoch 1; {hint}$") as caught:
        trainer.train(config_of(files, "plain"), run, quiet=True, on_epoch_end=interrupt)
    assert isinstance(caught.value, Interrupted)
    assert caught.value.signal_number == signal.SIGINT
    # The callback is called once the epoch's results and its checkpoint are on disk.
    assert seen == [(read_metrics(run)[0], 7, "ckpt-7")]
    assert len(read_metrics(run)) == 1
    return run


@pytest.fixture
def run(stopped_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def weights(path: Path) -> list[np.ndarray]:
    return dae.load_model(path).get_weights()


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_a_run_that_was_interrupted_is_used_with_its_checkpoint_and_finished_early(run, files, capsys):
    config = config_of(files, "plain")
    stopped = weights(run)
    assert f"warning: {run} is not finished: using its checkpoint {run}/checkpoints/best/" in capsys.readouterr().err
    assert same(prepare(config_of(files, start_from=str(run))).model.get_weights(), stopped)

    report = trainer.train(config, run, resume=True, finish=True, quiet=True)
    assert (report["epochs"], report["epoch"]) == (1, 1)
    assert same(weights(run), stopped)
    assert f"{run}: using the model of its report, after 1 of 2 epochs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_finished_early_is_verified_and_continued(run, finished_run, files):
    config = config_of(files, "plain")
    trainer.train(config, run, resume=True, finish=True, quiet=True)
    done = run_in_process("verify.py", run)
    assert done.stderr == ""
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
    done = run_in_process("verify.py", run, status=2)
    assert done.stdout == ""
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


@pytest.mark.slow
def test_a_run_whose_folder_is_another_one_stops_and_writes_nothing(files, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def change(epoch_end):
        run.rename(moved)
        run.mkdir()

    with pytest.raises(RunError, match=f"^--run-dir: {run} was renamed, deleted or replaced during the run"):
        trainer.train(config_of(files, epochs=2), run, quiet=True, on_epoch_end=change)
    assert not list(tmp_path.glob("run/*"))
    assert dae.load_model(moved)
