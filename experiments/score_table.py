"""Measure denoisers on the same noisy test images: `python experiments/score_table.py`; `--help` lists the flags."""

import dataclasses
from pathlib import Path

from dae import cli
from dae.config import PRESETS, RunConfig
from dae.errors import UsageError, lookup

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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
    """Folders of further finished runs; those that differ only in their seeds share a row."""
    models: tuple[str, ...] = ()
    """Also these .keras or .h5 files, a row for each."""
    filters: tuple[str, ...] | None = None
    """Classical denoisers, by their names in the table (default: all)."""
    tune_examples: int = 200
    """Validation images that each of them is tuned on."""
    classical_examples: int | None = None
    """Test images for them and for the posterior mean (default: all)."""
    noise_levels: tuple[float, ...] | None = None
    """Also a table of PSNR at these noise levels (without values: 0.1, 0.2, ... 1)."""
    level_examples: int = 1000
    """Test images of that table for the best filter and for the posterior mean."""
    dataset: str = RunConfig.dataset
    """As --dataset of run.py."""
    output: str = "runs/score_table"
    """Folder of score_table.md, .csv and .png, of noise_levels.csv and .png, and of the runs."""


def check(arguments: ScoreTableArguments) -> None:
    """Raise UsageError for a mistake that can be found without the images."""
    for name in arguments.presets:
        lookup(PRESETS, name, "--presets")
    if arguments.seeds < 1:
        raise UsageError(f"--seeds: expected a whole number >= 1, got {arguments.seeds}")
    for level in arguments.noise_levels or ():
        if not 0 < level < float("inf"):
            raise UsageError(f"--noise-levels: expected finite numbers > 0, got {level}")


def main() -> None:
    arguments = cli.parse(ScoreTableArguments)
    check(arguments)
    cli.import_tensorflow()
    from dae import runtime
    from dae.data import datasets, noise
    from dae.evaluation.evaluate import check_fits
    from dae.plugins import unique_names
    from dae.workdir.model_files import load_model

    try:
        from dae.analysis import classical, score_table, score_table_report
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; needed here: pip install '.[baselines]'") from None

    config, output = RunConfig(dataset=arguments.dataset), Path(arguments.output)
    data = datasets.load(config)
    filters = list(classical.METHODS) if arguments.filters is None else list(dict.fromkeys(arguments.filters))
    for name in filters:
        lookup(classical.METHODS, name, "--filters")
    tested = len(data.test) if arguments.classical_examples is None else arguments.classical_examples
    for flag, count, lowest, highest in (
        ("--tune-examples", arguments.tune_examples, 1, len(data.validation)),
        ("--classical-examples", tested, score_table.SHOWN, len(data.test)),
        ("--level-examples", arguments.level_examples, 1, len(data.test)),
    ):
        if not lowest <= count <= highest:
            raise UsageError(f"{flag}: expected a whole number from {lowest} to {highest}, got {count}")
    # One thread, so that every denoiser is timed on one core. Presets are trained in other processes.
    runtime.resolve(RunConfig(shards=1, intra_op_threads=1))
    trained = {
        (name, seed): output / name / f"seed-{seed}" for name in arguments.presets for seed in range(arguments.seeds)
    }
    for (name, seed), folder in trained.items():
        preset = dataclasses.replace(PRESETS[name], seed=seed, dataset=arguments.dataset)
        score_table.check_run(folder, noise.with_noise_level(preset, data.train))
    others = [Path(name) for name in arguments.runs]
    for folder in others:
        score_table.check_test_images(folder, config)
    models = [Path(name) for name in arguments.models]
    for path in (*others, *models):
        check_fits(load_model(path), data.test)
    score_table.make_folder(output)

    for (name, seed), folder in trained.items():
        if not (folder / "report.json").exists():
            print(f"training {folder}")
            flags = ("--preset", name, "--seed", str(seed), "--dataset", arguments.dataset)
            score_table.train_in_process(Path(__file__).with_name("run.py"), folder, flags)
    runs = [*trained.values(), *others]
    groups = score_table.group_runs(runs)
    rows: list[score_table.Row] = []

    def add(row: score_table.Row) -> None:
        rows.append(row)
        print(f"{row.name}: {row.estimate('psnr').mean:.2f} dB on {row.images:,} test images")

    add(score_table.noisy_row(config, data.test))
    for name, folders in groups.items():
        add(score_table.run_row(name, folders, config, data.test))
    names = unique_names([*groups, *(path.stem for path in models)])[len(groups) :]
    for name, path in zip(names, models, strict=True):
        add(score_table.model_row(name, path, config, data.test))
    add(score_table.posterior_row(config, data, tested))
    levels: list[score_table.LevelResult] = []
    with classical.processes(runtime.cores()) as executor:
        tuned = [score_table.tune(name, config, data.validation, arguments.tune_examples, executor) for name in filters]
        for one in tuned:
            add(score_table.filter_row(one, config, data.test, tested, executor))
        if arguments.noise_levels is not None:
            best = max(tuned, key=lambda one: one.psnr).name if tuned else None
            blind = {
                name: folders for name, folders in groups.items() if score_table.trained_on_a_range(folders, config)
            }
            if not blind:
                print("--noise-levels: none of the runs was trained on a range of levels; see --runs")
            examples = arguments.tune_examples, arguments.level_examples
            results = score_table.level_results(
                config, data, arguments.noise_levels or LEVELS, best, blind, *examples, executor
            )
            levels = list(results)
    tuned_on = arguments.tune_examples if filters else 0
    print(score_table_report.save(output, rows, config, data, runs, tuned_on, levels))
    print(f"table, picture and all values: {output}/score_table.md, .png, .csv")


if __name__ == "__main__":
    cli.run(main)
