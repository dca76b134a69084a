"""Compare losses over several seeds: `dae compare --losses bce mse`; see `--help`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import tyro

from dae import cli
from dae.config import RunConfig
from dae.errors import UsageError, lookup


@dataclasses.dataclass(frozen=True)
class CompareArguments(cli.ConfigArguments, cli.PresetArguments):
    """Train losses, or values of another setting, with the same seeds, and compare them; repeat the command to resume.

    Runs with the same seed have the same initial weights, shuffled order and noise.
    """

    losses: tuple[str, ...] = ()
    """The losses, each as for --loss of run.py; all others are compared with the first."""
    field: str | None = None
    """Compare values of this field of RunConfig instead, such as optimizer or width."""
    values: tuple[str, ...] = ()
    """The values of --field."""
    seeds: int = 5
    """Number of runs per value, with the seeds --seed, --seed + 1, ...; with --tune, from --seed + 1."""
    metric: str = "psnr"
    """Metric on validation images that ranks the values: psnr, ssim, mse, bce, bce_excess or accuracy."""
    tune: tyro.conf.FlagCreatePairsOff[bool] = False
    """First tune the learning rate of each value, with the seed --seed, on a grid around --learning-rate."""
    rates: int = 7
    """Number of learning rates on the grid, which has two per decade: an odd number."""
    output: str = "runs/comparison"
    """Folder of the runs, and of comparison.md, .csv and .png."""


def compared(arguments: CompareArguments) -> tuple[str, list[Any]]:
    """Return the field and its values. Raises UsageError for a mistake, before TensorFlow is imported."""
    config = arguments.config
    if arguments.field is None:
        if arguments.values or not arguments.losses:
            raise UsageError("--losses: expected one or more, such as bce mse; or --field and --values")
        if config.loss != RunConfig.loss and arguments.config_file is None:
            raise UsageError("--losses: --loss is a flag of run.py; leave it out")
        field, values = "loss", list(arguments.losses)
    else:
        if not arguments.values or arguments.losses:
            raise UsageError("--values: expected one or more values of --field, and no --losses")
        field = arguments.field.replace("-", "_")
        lookup(RunConfig.__dataclass_fields__, field, "--field")
        if field == "seed":
            raise UsageError("--field: seed is what repeats a run; see --seeds")
        values = [parse_value(text) for text in arguments.values]
    if arguments.tune and field == "learning_rate":
        raise UsageError("--tune: tunes the learning rate, and --field compares it; choose one of them")
    for value in values:
        changes: dict[str, Any] = {field: value}
        if dataclasses.replace(config, **changes).only_noisy:
            raise UsageError("--noisy: without --clean, there are no clean images to rank runs by; see --clean")
    return field, values


def parse_value(text: str) -> Any:
    """Return the value of `text`: parsed as JSON, such as 0.01, true or [0.1, 0.8], or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Compare what the command line names, write the report and print its conclusion."""
    arguments = cli.parse_config(CompareArguments)
    config, output = arguments.config, Path(arguments.output)
    field, values = compared(arguments)
    if arguments.seeds < 1:
        raise UsageError(f"--seeds: expected an integer >= 1, got {arguments.seeds}")
    if arguments.rates < 3 or arguments.rates % 2 == 0:
        raise UsageError(f"--rates: expected an odd number >= 3, got {arguments.rates}")
    os.environ.pop("TF_CONFIG", None)  # each run trains in this process alone
    cli.import_tensorflow(config.onednn)
    from dae.evaluation.metrics import METRICS

    try:
        from dae.analysis import comparison
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; needed here: pip install '.[compare]'") from None
    lookup(METRICS, arguments.metric, "--metric")

    first = config.seed + arguments.tune
    seeds = range(first, first + arguments.seeds)
    configs = comparison.candidates(field, values, config)
    rates = arguments.rates if arguments.tune else 0
    result = comparison.compare(field, configs, seeds, arguments.metric, output, rates)
    comparison.save(result, arguments.metric, output, config)
    print(comparison.conclusion(result, arguments.metric))
    print(f"tables and plots: {output}/comparison.md, .csv, .png; curves: tensorboard --logdir {output}")
