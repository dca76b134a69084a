"""Evaluate trained models on test images: `dae evaluate runs/NAME`; `--help` lists the flags."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from tqdm import tqdm

from dae import cli, config
from dae.config import RunConfig
from dae.errors import UsageError

if TYPE_CHECKING:
    from dae.analysis.denoisers import Trial


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Report the test metrics of a trained model and plot examples; or compare several models, on several noises."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, or .keras or .h5 files."""
    noise_levels: tuple[float, ...] | None = None
    """Evaluate at each of these levels: print a table, and write a plot and a .csv file beside it."""
    noises: tuple[str, ...] | None = None
    """Evaluate on each of these noise models, likewise."""
    bm3d: bool = False
    """Also evaluate BM3D, given the level of the Gaussian noise (extra `baselines`)."""
    figure: str | None = None
    """PNG file to write; None: evaluation.png or sweep.png in the run's folder or beside the model file, and for
    several models sweep.png in the current folder."""
    data: str | None = None
    """Test on these images, read as by --data of run.py: on their split test, or on all if they are not split; None: on
    those of the run, or MNIST for a model file."""
    noisy: str | None = None
    """As --noisy of run.py: pairs of these pictures and those of --clean, instead of --data."""
    clean: str | None = None
    """As --clean of run.py, instead of --data."""
    image_size: int | tuple[int, int] | None = None
    """As --image-size of run.py, for --data."""
    skip_broken: bool = False
    """As --skip-broken of run.py, for --data."""
    grey: bool = False
    """As --grey of run.py, for --data."""
    value_range: tuple[float, float] | None = None
    """As --value-range of run.py, for --data; None: that of the run, for images of the same type."""
    axes: str | None = None
    """As --axes of run.py, for --data."""
    noise: str | None = None
    """Noise model; None: that of the run, or gaussian for a model file."""
    noise_level: float | tuple[float, float] | None = None
    """Strength of the noise; None: that of the run, or 0.5 for a model file, and 0 for pairs of --data."""
    clip_noise: bool | None = None
    """Clip noisy images to [0, 1]; None: as in the run, or True for a model file."""
    seed: int | None = None
    """Seed of the noise; None: that of the run, or 0 for a model file."""


def evaluated_config(path: Path, arguments: EvaluateArguments) -> RunConfig:
    """Return the configuration to evaluate the model at `path` with: the run's, or the default, and the flags."""
    trained = config.read(path / "config.json") if path.is_dir() else RunConfig()
    names = ("noise", "noise_level", "clip_noise", "seed")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    data_names = ("data", "noisy", "clean", "image_size", "skip_broken", "grey", "value_range", "axes")
    reading = {name: getattr(arguments, name) for name in data_names}
    if arguments.data is not None or arguments.clean is not None:
        changes |= reading | {"train_examples": None, "validation_examples": None}
    elif given := [name for name, value in reading.items() if value]:
        raise UsageError(f"{config.flag(given[0])}: applies to --data, which is not given")
    # Evaluation has no shards, so that each operation can use all cores.
    evaluated = dataclasses.replace(trained, **changes, shards=1, intra_op_threads=None)
    if evaluated.only_noisy and arguments.noise_levels is not None:
        raise UsageError(
            f"--noise-levels: no noise is added to the images of {path}, which are noisy already; add --data, or "
            "--noisy and --clean"
        )
    return evaluated


def load_trial(path: Path, name: str, settings: RunConfig, arguments: EvaluateArguments) -> "Trial":
    """Return the model at `path` with its test images and the noise of `settings`; print what was read."""
    from dae.analysis.denoisers import model_trial
    from dae.data import datasets, noise
    from dae.workdir.model_files import load_model, value_range_of

    model = load_model(path)
    if arguments.data is None and arguments.clean is None:
        splits = datasets.load(settings)
        images, notes = splits.test, splits.notes
    else:
        images, notes = datasets.load_test(settings, value_range_of(model))
        if images.is_paired and arguments.noise_level is None:  # pairs are noisy already
            settings = dataclasses.replace(settings, noise_level=None if arguments.noise else 0.0)
    noise.check(settings, (*images.shapes[0], images.channels), noise.level_range(settings, images.is_paired))
    trial = model_trial(name, model, settings, images)
    print(*notes, sep="\n")
    return trial


def describe_noise(trial: "Trial") -> str:
    """Return the noise of a trial as text, such as `gaussian noise 0.5, clipped`."""
    if trial.images.is_paired and (trial.level == 0 or trial.config.only_noisy):
        return "pairs of noisy and clean images"
    level = " to ".join(f"{end:g}" for end in np.atleast_1d(trial.level))
    return f"{trial.config.noise} noise {level}, {'clipped' if trial.config.clip_noise else 'not clipped'}"


def main() -> None:
    """Evaluate the models that the command line names, print their metrics and plot examples or curves."""
    arguments = cli.parse(EvaluateArguments)
    if not arguments.models:
        raise UsageError("expected one or more models, such as runs/mnist-conv-bce")
    paths = [Path(name) for name in arguments.models]
    configs = [evaluated_config(path, arguments) for path in paths]
    several = (arguments.noise_levels, arguments.noises) != (None, None)
    is_sweep = len(paths) > 1 or several or arguments.bm3d
    folder = (paths[0] if paths[0].is_dir() else paths[0].parent) if len(paths) == 1 else Path()
    figure = Path(arguments.figure or folder / ("sweep.png" if is_sweep else "evaluation.png"))

    cli.import_tensorflow(configs[0].onednn)
    from dae import runtime
    from dae.analysis.denoisers import NO_DENOISING, bm3d_for, save_sweep, score, sweep
    from dae.evaluation.metrics import format_metrics
    from dae.files import check_output
    from dae.reporting import plots

    runtime.resolve(configs[0])
    check_output(figure, (".png",), "--figure")
    names = [path.name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    trials = [load_trial(*inputs, arguments) for inputs in zip(paths, names, configs, strict=True)]
    for path, trial in zip(paths, trials, strict=True):
        if trial.images.digest != trials[0].images.digest:
            raise UsageError(f"{path}: has other test images than {paths[0]}; --data tests both on the same")
    levels = arguments.noise_levels or (trials[0].level,)
    swept = sweep(trials, arguments.noises or (trials[0].config.noise,), levels)
    for trial in [trial for trial in swept if trial.denoiser == NO_DENOISING] if arguments.bm3d else ():
        if trial.config.noise != "gaussian" or isinstance(trial.level, tuple):
            raise UsageError("--bm3d: needs Gaussian noise of one level; add --noises gaussian --noise-levels LEVEL")
        swept.append(dataclasses.replace(trial, denoiser="BM3D", denoise=bm3d_for(trial.level)))
    if is_sweep:
        print(save_sweep(figure, swept, tqdm(score(swept), total=len(swept), disable=None)))
        print(f"plot: {figure}; all metrics: {figure.with_suffix('.csv')}")
    else:
        _, trial = swept
        (metrics,) = score([trial])
        means = {f"test_{metric}": mean for metric, mean in metrics.items()}
        print(f"{paths[0]} on {describe_noise(trial)}: {format_metrics(means)}")
        plots.save_denoised(figure, trial.images, trial.config, trial.denoise)
        print(f"plot: {figure}")
