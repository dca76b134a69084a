import os
import signal
import threading

import pytest
from runs import config_of

from dae.errors import Interrupted
from dae.training import trainer
from dae.training.checkpoints import saved_in
from dae.training.interruption import STOPPING, Interruption
from dae.workdir.workdir import read_metrics


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


def test_a_signal_at_the_end_of_an_epoch_keeps_the_epoch(files, tmp_path):
    """The callback is called once the epoch's results and its checkpoint are on disk."""
    run, seen = tmp_path / "run", []

    def interrupt(epoch_end: trainer.EpochEnd) -> None:
        checkpoints = [prefix.name for prefix in saved_in(run / "checkpoints" / "latest")]
        seen.append((epoch_end.values, epoch_end.step, checkpoints))
        send(signal.SIGINT)

    hint = r"continue with dae.train\(config, '.*/run', resume=True\)"
    with pytest.raises(KeyboardInterrupt, match=rf"epoch 1; {hint}$") as caught:
        trainer.train(config_of(files, checkpoint_every=None), run, quiet=True, on_epoch_end=interrupt)
    assert isinstance(caught.value, Interrupted)
    assert caught.value.signal_number == signal.SIGINT
    assert seen == [(read_metrics(run)[0], 7, ["ckpt-7"])]
    assert len(read_metrics(run)) == 1
