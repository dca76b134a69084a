"""Trains several losses on the same seeds and says which is better: python experiments/compare_losses.py --help."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from dae import cli, config
from dae.config import PRESETS, RunConfig
from dae.errors import UsageError


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Compare losses on the same initial weights, order and noise. The same line goes on after any stop."""

    losses: tuple[str, ...]
    """What to compare, each as for run.py's --loss; differences are to the first."""
    seeds: int = 5
    """Runs of each loss; they have the seeds --seed, --seed + 1 ..."""
    metric: str = "psnr"
    """What ranks them: psnr, ssim, mse, bce, bce_excess or accuracy, on validation images."""
    output: str = "runs/comparison"
    """Folder of the runs, and of comparison.md, .csv, .json and .png."""
    settings: Annotated[RunConfig, tyro.conf.OmitArgPrefixes] = PRESETS["default"]


def main() -> None:
    arguments = cli.parse(CompareArguments)
    settings, output = arguments.settings, Path(arguments.output)
    if not arguments.losses or settings.loss != RunConfig.loss:
        raise UsageError("--losses: name one or more, such as bce mse; --loss is for run.py")
    if arguments.seeds < 1:
        raise UsageError(f"--seeds: {arguments.seeds} is not a whole number from 1 up")
    if settings.validation_examples == 0:
        raise UsageError("--validation-examples: is 0, but losses are ranked on validation images")
    for loss in arguments.losses:
        config.pinned(dataclasses.replace(settings, loss=loss))  # a slip is told before TensorFlow starts
    cli.load_tensorflow(settings)
    from dae import errors
    from dae.evaluation import metrics

    try:
        from dae.analysis import loss_comparison
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed, and needed here: pip install '.[compare]'") from None
    errors.choose(metrics.METRICS, arguments.metric, "--metric")

    seeds = range(settings.seed, settings.seed + arguments.seeds)
    runs = loss_comparison.train(arguments.losses, settings, seeds, output)
    comparison = loss_comparison.gather(runs, seeds)
    loss_comparison.save(comparison, arguments.metric, output, settings)
    print(loss_comparison.conclusion(comparison, arguments.metric))
    print(f"tables and picture: {output}/comparison.md, .csv, .json, .png; curves: tensorboard --logdir {output}")


if __name__ == "__main__":
    cli.run(main)
