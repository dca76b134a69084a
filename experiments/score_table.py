"""Measure denoisers on the same noisy test images: `python experiments/score_table.py`; `--help` lists the flags."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from dae import cli
from dae.config import PRESETS, RunConfig, preset
from dae.errors import UsageError, as_usage_error, lookup


@dataclasses.dataclass(frozen=True)
class ScoreTableArguments:
    """Train presets, and compare them with classical denoisers and others; repeat the command to resume.

    The noise is Gaussian with standard deviation 0.5, clipped to [0, 1].
    """

    presets: tuple[str, ...] = ("fast", "default", "tutorial")
    """Presets to train, in OUTPUT/PRESET/seed-N."""
    seeds: int = 3
    """Number of runs per preset, with the seeds 0, 1, ..."""
    runs: tuple[str, ...] = ()
    """Folders of further finished runs. Runs that differ only in their seeds share a row, which is named by the nearest
    preset and the flags that differ from it."""
    models: tuple[str, ...] = ()
    """Also these .keras or .h5 files, a row for each."""
    filters: tuple[str, ...] | None = None
    """Classical denoisers, by their names in the table; None: all."""
    tune_examples: int = 200
    """Validation images that each of them is tuned on."""
    classical_examples: int | None = None
    """Test images for them and for the posterior mean (multiples of 500 have the networks' noise); None: all."""
    dataset: str = RunConfig.dataset
    """As --dataset of run.py."""
    output: str = "runs/score_table"
    """Folder of score_table.md, .csv and .png, and of the runs."""


def train(presets: Sequence[str], seeds: int, config: RunConfig, output: Path) -> list[Path]:
    """Train the presets with each seed on the images and the noise of `config`, and return the folders of the runs.

    Raises UsageError, before the first run, if a folder holds another run or is in use.
    """
    from dae.analysis.comparison import many_runs
    from dae.training import trainer
    from dae.workdir import workdir

    configs = {
        output / name / f"seed-{seed}": preset(name, seed=seed, dataset=config.dataset)
        for name in presets
        for seed in range(seeds)
    }
    for folder, config in configs.items():
        with workdir.opened(folder, config, resume=True):
            pass
    with many_runs():
        for folder, config in configs.items():
            if workdir.finished_report(folder, config) is None:
                print(f"training {folder}")
                trainer.train(config, folder, resume=True, quiet=True)
    return list(configs)


def main() -> None:
    arguments = cli.parse(ScoreTableArguments)
    for name in arguments.presets:
        lookup(PRESETS, name, "--presets")
    if arguments.seeds < 1:
        raise UsageError(f"--seeds: expected an integer >= 1, got {arguments.seeds}")
    os.environ.pop("TF_CONFIG", None)  # each run has this process alone
    cli.import_tensorflow()
    from dae import runtime
    from dae.data import datasets
    from dae.evaluation.evaluate import check_fits
    from dae.files import check_output
    from dae.plugins import unique_names
    from dae.workdir.model_files import load_model

    try:
        from dae.analysis import classical, score_table
        from dae.analysis.denoisers import SAMPLES, Score, model_trial, no_denoising, score
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; needed here: pip install '.[baselines]'") from None

    config = RunConfig(dataset=arguments.dataset)
    output = Path(arguments.output)
    data = datasets.load(config)
    filters = tuple(classical.FILTERS) if arguments.filters is None else arguments.filters
    for name in filters:
        lookup(classical.FILTERS, name, "--filters")
    tuned, tested = arguments.tune_examples, arguments.classical_examples
    tested = len(data.test) if tested is None else tested
    for flag, count, least, most in (
        ("--tune-examples", tuned, 1, len(data.validation)),
        ("--classical-examples", tested, SAMPLES, len(data.test)),
    ):
        if not least <= count <= most:
            raise UsageError(f"{flag}: expected an integer from {least} to {most}, got {count}")
    # One thread, so that every denoiser is timed on one core. A run computes its shards in parallel all the same.
    runtime.resolve(RunConfig(shards=1, intra_op_threads=1))
    runs, models = [Path(name) for name in arguments.runs], [Path(name) for name in arguments.models]
    for folder in runs:
        score_table.check_test_images(folder, config)
    for path in (*runs, *models):
        check_fits(load_model(path), data.test)
    with as_usage_error("--output", "cannot be written", OSError):
        output.mkdir(parents=True, exist_ok=True)
    check_output(output / "score_table.md", (".md",), "--output")
    runs = [*train(arguments.presets, arguments.seeds, config, output), *runs]
    groups = score_table.group_runs(runs)
    with classical.processes(runtime.cores()) as pool:
        names = unique_names([*groups, *(path.stem for path in models)])[len(groups) :]
        trials = [
            no_denoising(data.test, config),
            *score_table.run_trials(groups, config, data.test),
            *(model_trial(name, load_model(path), config, data.test) for name, path in zip(names, models, strict=True)),
            score_table.posterior_trial(config, data, tested),
            *score_table.filter_trials(filters, config, data, tuned, tested, pool),
        ]
        scores: list[Score] = []
        for result in score(trials):
            scores.append(result)
            print(f"{result.trial.denoiser}: {result.metrics['psnr']:.2f} dB")
    print(score_table.save(output, scores, data, tuned))
    print(f"table, picture and all values: {output}/score_table.md, .png, .csv")


if __name__ == "__main__":
    cli.run(main)
