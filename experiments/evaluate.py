"""Tests finished runs, or .keras or .h5 files: python experiments/evaluate.py runs/NAME; --help tells more."""

import dataclasses
from pathlib import Path

import tyro
from tqdm import tqdm

from dae import cli, config
from dae.config import RunConfig
from dae.errors import UsageError


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Report the test figures of a trained model and draw what it does; or compare several, on several noises."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, or .keras or .h5 files."""
    noise_levels: tuple[float, ...] | None = None
    """Test at each of these levels: tables, a plot, and a .csv file beside the plot."""
    noises: tuple[str, ...] | None = None
    """Test on each of these noise models, likewise."""
    figure: str | None = None
    """Where to write the picture (default: evaluation.png or sweep.png in the run's folder, or beside the file)."""
    data: str | None = None
    """Test on the test part of these images instead, as --data of run.py (default: as the run; MNIST for a file)."""
    image_size: int | tuple[int, int] | None = None
    """As --image-size of run.py (default: as the run)."""
    skip_broken: bool | None = None
    """As --skip-broken of run.py (default: as the run)."""
    noise: str | None = None
    """Noise model (default: as the run; gaussian for a file)."""
    noise_level: float | tuple[float, float] | None = None
    """Strength of the noise (default: as the run; 0.5 for a file)."""
    clip_noise: bool | None = None
    """Clip noisy images to [0, 1] (default: as the run; True for a file)."""
    seed: int | None = None
    """Decides the noise (default: as the run; 0 for a file)."""


def tested(path: Path, arguments: EvaluateArguments) -> RunConfig:
    """What to test the model at `path` with."""
    trained = config.read(path / "config.json") if path.is_dir() else RunConfig()
    names = ("data", "image_size", "skip_broken", "noise", "noise_level", "clip_noise", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "data" in given:
        given |= {"data_digest": None, "train_examples": None, "validation_examples": 0}
        if not Path(given["data"]).is_dir():
            given = {"image_size": None, "skip_broken": False} | given
    return dataclasses.replace(trained, **given)


def main() -> None:
    arguments = cli.parse(EvaluateArguments)
    if not arguments.models:
        raise UsageError("name one or more models, such as runs/mnist-conv-bce")
    paths = [Path(name) for name in arguments.models]
    configs = [tested(path, arguments) for path in paths]
    is_sweep = len(paths) > 1 or arguments.noise_levels is not None or arguments.noises is not None
    folder = (paths[0] if paths[0].is_dir() else paths[0].parent) if len(paths) == 1 else Path()
    figure = Path(arguments.figure or folder / ("sweep.png" if is_sweep else "evaluation.png"))

    configs[0] = cli.load_tensorflow(configs[0])
    from dae.analysis import noise_sweep
    from dae.data import datasets, noise
    from dae.evaluation import metrics
    from dae.workdir import model_files, workdir

    workdir.check_output(figure, (".png",), "--figure")
    contenders = []
    for path, settings in zip(paths, configs, strict=True):
        model, splits = model_files.load_model(path), datasets.load(settings)
        model_files.check_fits(model, splits.test)
        for note in splits.notes:
            print(note)
        name = path.name if [other.name for other in paths].count(path.name) == 1 else str(path)
        contenders.append(noise_sweep.Contender(name, model, settings, splits.test))

    if is_sweep:
        noises = arguments.noises or (configs[0].noise,)
        levels = arguments.noise_levels or (configs[0].noise_level,)
        count = (len(contenders) + 1) * len(noises) * len(levels)
        results = list(tqdm(noise_sweep.sweep(contenders, noises, levels), total=count, disable=None))
        print(noise_sweep.tables(results))
        noise_sweep.draw(figure, results, contenders)
        noise_sweep.write_csv(figure.with_suffix(".csv"), results)
        print(f"picture: {figure}; every figure: {figure.with_suffix('.csv')}")
    else:
        (only,) = contenders
        noise.check(only.config, only.images.shape[1:])
        evaluate = metrics.evaluator(only.model, None, only.config.micro_batches or 1)
        figures = model_files.test(only.model, evaluate, only.config, only.images, figure)
        clipped = "clipped" if only.config.clip_noise else "not clipped"
        level = noise_sweep.level_in_words(only.config.noise_level)
        print(f"{paths[0]} on {only.config.noise} noise {level}, {clipped}: {metrics.in_words(figures)}")
        print(f"picture: {figure}")


if __name__ == "__main__":
    cli.run(main)
