"""Prove that a finished run can be reproduced, bit for bit: `dae verify runs/NAME`."""

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

import tyro

from dae import cli, config, resolved
from dae.errors import Interrupted, RunError, UsageError
from dae.files import check_utf8


class Stopped(Exception):
    """Ends a rerun where `--finish` ended the run."""


@dataclasses.dataclass(frozen=True)
class VerifyArguments:
    """Rerun a finished run from its config.json in a temporary folder, and compare every bit of the results."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run."""


def main() -> None:
    """Rerun the run that the command line names, and compare both. Raises RunError if they differ."""
    run = Path(cli.parse(VerifyArguments).run)
    check_utf8(run)
    settings, recorded = config.read(run / "config.json"), resolved.read(run)
    os.environ.pop("TF_CONFIG", None)  # the bits are those of one process
    cli.import_tensorflow(recorded.onednn)
    from dae.analysis.reproducibility import first_difference
    from dae.training.trainer import EpochEnd, train
    from dae.workdir.workdir import read_metrics, read_report

    epochs = read_report(run)["epochs"]
    if len(read_metrics(run)) > epochs:
        raise UsageError(f"{run}: has been trained further than its report of {epochs} epochs; finish it with --resume")

    def stop(epoch_end: EpochEnd) -> None:
        if epoch_end.values["epoch"] == epochs < settings.epochs:
            raise Stopped

    with tempfile.TemporaryDirectory() as scratch:
        rerun = Path(scratch) / "rerun"
        try:
            with contextlib.suppress(Stopped):
                train(settings, rerun, recorded=recorded, on_epoch_end=stop)
            if epochs < settings.epochs:
                train(settings, rerun, resume=True, finish=True)
        except Interrupted as interruption:
            raise Interrupted(interruption.signal_number, "stopped; nothing was compared") from None
        difference = first_difference(run, rerun)
    if difference is not None:
        raise RunError(f"{run} and its rerun first differ at {difference}")
    print(f"{run} and its rerun are identical in every bit")
