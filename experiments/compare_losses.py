"""Compare losses over several seeds: `python experiments/compare_losses.py --losses bce mse`; see `--help`."""

import dataclasses
from pathlib import Path

from dae import cli
from dae.config import RunConfig, flag
from dae.errors import UsageError, lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments(cli.ConfigArguments):
    """Train losses with the same initial weights, order and noise, and compare them; repeat the command to resume."""

    losses: tuple[str, ...]
    """The losses, each as --loss of run.py; differences are from the first."""
    seeds: int = 5
    """Number of runs per loss, with the seeds --seed, --seed + 1, ..."""
    metric: str = "psnr"
    """Metric on validation images that ranks the losses: psnr, ssim, mse, bce, bce_excess or accuracy."""
    output: str = "runs/comparison"
    """Folder of the runs, and of comparison.md, .csv, .json and .png."""


def main() -> None:
    arguments = cli.parse(CompareArguments)
    config, output = arguments.config, Path(arguments.output)
    if not arguments.losses or config.loss != RunConfig.loss:
        raise UsageError("--losses: expected one or more, such as bce mse; --loss is a flag of run.py")
    if arguments.seeds < 1:
        raise UsageError(f"--seeds: expected a whole number >= 1, got {arguments.seeds}")
    if config.validation_examples == 0:
        raise UsageError(f"{flag('validation_examples')}: 0, but losses are ranked on validation images")
    for loss in arguments.losses:
        dataclasses.replace(config, loss=loss)  # reports a mistake before TensorFlow is imported
    cli.import_tensorflow(config.onednn)
    from dae.evaluation.metrics import METRICS

    try:
        from dae.analysis import loss_comparison
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; needed here: pip install '.[compare]'") from None
    lookup(METRICS, arguments.metric, "--metric")

    seeds = range(config.seed, config.seed + arguments.seeds)
    runs = loss_comparison.train_all(arguments.losses, config, seeds, output)
    comparison = loss_comparison.gather(runs, seeds)
    loss_comparison.save(comparison, arguments.metric, output, config)
    print(loss_comparison.conclusion(comparison, arguments.metric))
    print(f"tables and plots: {output}/comparison.md, .csv, .json, .png; curves: tensorboard --logdir {output}")


if __name__ == "__main__":
    cli.run(main)
