"""Evaluate trained models on test images: `python experiments/evaluate.py runs/NAME`; `--help` lists the flags."""

import dataclasses
from pathlib import Path

import tyro
from tqdm import tqdm

from dae import cli, config
from dae.config import RunConfig
from dae.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Report the test metrics of a trained model and plot examples; or compare several models, on several noises."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, or .keras or .h5 files."""
    noise_levels: tuple[float, ...] | None = None
    """Evaluate at each of these levels: prints tables, and writes a plot and a .csv file beside it."""
    noises: tuple[str, ...] | None = None
    """Evaluate on each of these noise models, likewise."""
    figure: str | None = None
    """Where to write the plot (default: evaluation.png or sweep.png in the run's folder, or beside the file)."""
    data: str | None = None
    """Test on these images, as --data of run.py, or on their part test (default: as the run; MNIST for a file)."""
    image_size: int | tuple[int, int] | None = None
    """As --image-size of run.py, for --data."""
    skip_broken: bool = False
    """As --skip-broken of run.py, for --data."""
    grey: bool = False
    """As --grey of run.py, for --data."""
    value_range: tuple[float, float] | None = None
    """As --value-range of run.py, for --data."""
    noise: str | None = None
    """Noise model (default: as the run; gaussian for a file)."""
    noise_level: float | tuple[float, float] | None = None
    """Strength of the noise (default: as the run; 0.5 for a file, 0 for pairs of --data)."""
    clip_noise: bool | None = None
    """Clip noisy images to [0, 1] (default: as the run; True for a file)."""
    seed: int | None = None
    """Seed of the noise (default: as the run; 0 for a file)."""


def test_config(path: Path, arguments: EvaluateArguments) -> RunConfig:
    """Return the configuration to evaluate the model at `path` with: the run's, or the default, and the flags."""
    trained = config.read(path / "config.json") if path.is_dir() else RunConfig()
    names = ("noise", "noise_level", "clip_noise", "seed")
    overrides = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    reading = {name: getattr(arguments, name) for name in ("data", "image_size", "skip_broken", "grey", "value_range")}
    if arguments.data is not None:
        overrides |= reading | {"data_digest": None, "train_examples": None, "validation_examples": None}
        if trained.data_digest is not None and trained.noise_range == (0, 0):  # of pairs, which --data may not be
            overrides.setdefault("noise_level", None)
    elif given := [name for name, value in reading.items() if value]:
        raise UsageError(f"{config.flag(given[0])}: applies to --data, which is not given")
    return dataclasses.replace(trained, **overrides)


def main() -> None:
    arguments = cli.parse(EvaluateArguments)
    if not arguments.models:
        raise UsageError("expected one or more models, such as runs/mnist-conv-bce")
    paths = [Path(name) for name in arguments.models]
    configs = [test_config(path, arguments) for path in paths]
    is_sweep = len(paths) > 1 or arguments.noise_levels is not None or arguments.noises is not None
    folder = (paths[0] if paths[0].is_dir() else paths[0].parent) if len(paths) == 1 else Path()
    figure = Path(arguments.figure or folder / ("sweep.png" if is_sweep else "evaluation.png"))

    cli.import_tensorflow(configs[0].onednn)
    from dae import runtime
    from dae.analysis import noise_sweep
    from dae.data import datasets, noise
    from dae.data.images import same
    from dae.evaluation import evaluate
    from dae.evaluation.metrics import format_metrics
    from dae.reporting import plots
    from dae.workdir.files import check_output
    from dae.workdir.model_files import load_model

    configs[0] = runtime.resolve(configs[0])
    check_output(figure, (".png",), "--figure")
    denoisers = []
    for path, settings in zip(paths, configs, strict=True):
        model = load_model(path)
        if arguments.data is None:
            splits = datasets.load(settings)
            images, notes = splits.test, splits.notes
        else:
            images, notes = datasets.load_test(settings)
            if images.is_paired and arguments.noise_level is None:  # noisy already, whatever the run's were
                settings = dataclasses.replace(settings, noise_level=None if arguments.noise else 0.0)
        evaluate.check_fits(model, images)
        for note in notes:
            print(note)
        name = path.name if [other.name for other in paths].count(path.name) == 1 else str(path)
        settings = noise.with_noise_level(settings, images)
        denoisers.append(noise_sweep.Denoiser(name, model, settings, images))
        if not same(images, denoisers[0].images):
            raise UsageError(f"{path}: has other test images than {paths[0]}; --data tests both on the same")

    if is_sweep:
        noises = arguments.noises or (configs[0].noise,)
        levels = arguments.noise_levels or (denoisers[0].config.noise_level or 0.0,)
        count = (len(denoisers) + 1) * len(noises) * len(levels)
        results = list(tqdm(noise_sweep.sweep(denoisers, noises, levels), total=count, disable=None))
        print(noise_sweep.tables(results))
        noise_sweep.draw(figure, results, denoisers)
        noise_sweep.write_csv(figure.with_suffix(".csv"), results)
        print(f"plot: {figure}; all metrics: {figure.with_suffix('.csv')}")
    else:
        (only,) = denoisers
        noise.check(only.config, (*only.images.shapes[0], only.images.channels))
        evaluator = evaluate.make_evaluator(only.model, shards=only.config.shards or 1)
        report = evaluate.evaluate_test(evaluator, only.config, only.images)
        plots.save_denoised(figure, evaluate.denoise_samples(only.model, only.config, only.images))
        clipped = "clipped" if only.config.clip_noise else "not clipped"
        level = noise_sweep.format_level(only.config.noise_level or 0.0)
        of_noise = f"{only.config.noise} noise {level}, {clipped}"
        if only.images.is_paired and only.config.noise_range == (0, 0):
            of_noise = "pairs of noisy and clean images"
        print(f"{paths[0]} on {of_noise}: {format_metrics(report)}")
        print(f"plot: {figure}")


if __name__ == "__main__":
    cli.run(main)
