"""Proves that a finished run can be had again, bit for bit: python experiments/verify.py runs/NAME."""

import dataclasses
import tempfile
from pathlib import Path

import tyro

from dae import cli, config
from dae.errors import RunError, Stopped


@dataclasses.dataclass(frozen=True)
class VerifyArguments:
    """Rerun a finished run from its config.json into a scratch folder, and say whether the bits agree."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run."""


def main() -> None:
    run = Path(cli.parse(VerifyArguments).run)
    rerun = config.read(run / "config.json")
    cli.load_tensorflow(rerun)
    from dae.analysis import reproducibility
    from dae.training import trainer
    from dae.workdir import workdir

    workdir.check_finished(run)
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "again"
        try:
            trainer.train(rerun, again)
        except Stopped as stop:
            raise Stopped(stop.signal_number, "stopped; nothing was compared") from None
        difference = reproducibility.first_difference(run, again)
    if difference is not None:
        raise RunError(f"{run} and its rerun part at {difference}")
    print(f"{run} and its rerun agree in every bit")


if __name__ == "__main__":
    cli.run(main)
