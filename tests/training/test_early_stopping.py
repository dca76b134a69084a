"""A run with --patience stops once the validation loss has no longer fallen, also if it is interrupted there."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY

from dae.analysis.reproducibility import first_difference
from dae.errors import UsageError
from dae.training import trainer
from dae.workdir.workdir import read_metrics

# With so high a learning rate, some epochs are worse than those before them. An epoch is one step.
CONFIG = replace(TINY, train_examples=64, validation_examples=32, epochs=40, learning_rate=0.1, bce_steps=0, patience=1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped early, and what it printed in `printed`."""
    folder, printed = tmp_path_factory.mktemp("runs") / "stopped", io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.train(CONFIG, folder)
    (folder / "printed").write_text(printed.getvalue())
    return folder


def first_stop(losses: list[float], patience: int) -> int:
    """Return the first epoch, from 1, at the end of which the lowest loss is `patience` epochs old."""
    return next(epoch for epoch in range(1, len(losses) + 1) if epoch - 1 - np.argmin(losses[:epoch]) >= patience)


def test_run_stops_after_the_documented_number_of_epochs_and_keeps_the_best(stopped):
    losses = [line["validation_loss"] for line in read_metrics(stopped)]
    assert len(losses) < CONFIG.epochs
    assert len(losses) == first_stop(losses, patience=1)
    message = f"stopped after epoch {len(losses)}, 1 epochs after the lowest validation loss"
    assert message in (stopped / "printed").read_text()
    report = trainer.train(CONFIG, stopped, resume=True)  # finished, so that this only returns the report
    assert report["epoch"] == 1 + int(np.argmin(losses)) == len(losses) - 1


@pytest.mark.slow
@pytest.mark.parametrize("before_the_end", [0, 1])
def test_run_interrupted_at_its_last_epochs_is_resumed_to_the_same_bits(before_the_end, stopped, tmp_path):
    """Also if nothing is left but to stop."""
    last = len(read_metrics(stopped)) - before_the_end

    def interrupt(line: dict[str, float]) -> None:
        if line["epoch"] == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(CONFIG, tmp_path / "run", quiet=True, on_epoch_end=interrupt)
    assert len(read_metrics(tmp_path / "run")) == last
    assert not (tmp_path / "run" / "report.json").exists()
    trainer.train(CONFIG, tmp_path / "run", quiet=True, resume=True)
    assert first_difference(tmp_path / "run", stopped) is None


@pytest.mark.slow
def test_more_epochs_do_not_continue_a_run_that_stopped(stopped):
    lines = read_metrics(stopped)
    report = trainer.train(replace(CONFIG, epochs=50), stopped, quiet=True, resume=True)
    assert read_metrics(stopped) == lines
    assert report["epoch"] == len(lines) - 1


def test_patience_needs_validation_images(tmp_path):
    with pytest.raises(UsageError, match="--patience: needs validation images; --validation-examples is 0"):
        trainer.train(replace(CONFIG, validation_examples=0), tmp_path / "runs" / "run")
    assert not (tmp_path / "runs").exists()
