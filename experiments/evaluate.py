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
    """Test on the test part of these images, as --data of run.py (default: as the run; MNIST for a file)."""
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
    """Seed of the noise (default: as the run; 0 for a file)."""


def test_config(path: Path, arguments: EvaluateArguments) -> RunConfig:
    """Return the configuration to evaluate the model at `path` with: the run's, or the default, and the flags."""
    trained = config.read(path / "config.json") if path.is_dir() else RunConfig()
    names = ("data", "image_size", "skip_broken", "noise", "noise_level", "clip_noise", "seed")
    overrides = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "data" in overrides:
        overrides |= {"data_digest": None, "train_examples": None, "validation_examples": 0}
        if not Path(overrides["data"]).is_dir():
            overrides = {"image_size": None, "skip_broken": False} | overrides
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
    from dae.evaluation import evaluate
    from dae.evaluation.metrics import format_metrics
    from dae.reporting import plots
    from dae.workdir.files import check_output
    from dae.workdir.model_files import load_model

    configs[0] = runtime.resolve(configs[0])
    check_output(figure, (".png",), "--figure")
    denoisers = []
    for path, settings in zip(paths, configs, strict=True):
        model, splits = load_model(path), datasets.load(settings)
        evaluate.check_fits(model, splits.test)
        for note in splits.notes:
            print(note)
        name = path.name if [other.name for other in paths].count(path.name) == 1 else str(path)
        denoisers.append(noise_sweep.Denoiser(name, model, settings, splits.test))

    if is_sweep:
        noises = arguments.noises or (configs[0].noise,)
        levels = arguments.noise_levels or (configs[0].noise_level,)
        count = (len(denoisers) + 1) * len(noises) * len(levels)
        results = list(tqdm(noise_sweep.sweep(denoisers, noises, levels), total=count, disable=None))
        print(noise_sweep.tables(results))
        noise_sweep.draw(figure, results, denoisers)
        noise_sweep.write_csv(figure.with_suffix(".csv"), results)
        print(f"plot: {figure}; all metrics: {figure.with_suffix('.csv')}")
    else:
        (only,) = denoisers
        noise.check(only.config, only.images.shape[1:])
        evaluator = evaluate.make_evaluator(only.model, shards=only.config.shards or 1)
        report = evaluate.evaluate_test(evaluator, only.config, only.images)
        plots.save_denoised(figure, evaluate.denoise_samples(only.model, only.config, only.images))
        clipped = "clipped" if only.config.clip_noise else "not clipped"
        level = noise_sweep.format_level(only.config.noise_level)
        print(f"{paths[0]} on {only.config.noise} noise {level}, {clipped}: {format_metrics(report)}")
        print(f"plot: {figure}")


if __name__ == "__main__":
    cli.run(main)
