"""Tests a finished run, or a .keras or .h5 file: python experiments/evaluate.py runs/NAME."""

import dataclasses
from pathlib import Path

import tyro

from dae import command_line, config, datasets
from dae.config import RunConfig


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Report the test figures of a trained model and draw what it does."""

    model: tyro.conf.Positional[str]
    """Folder of a finished run, or a .keras or .h5 file."""
    figure: str | None = None
    """Where to write the picture (default: evaluation.png in the run's folder, or beside the file)."""
    data: str | None = None
    """Test on x_test of this .npz file instead (default: as the run; MNIST for a file)."""
    noise: str | None = None
    """Name of the noise model (default: as the run; gaussian for a file)."""
    noise_level: float | None = None
    """Strength of the noise (default: as the run; 0.5 for a file)."""
    seed: int | None = None
    """Decides the noise (default: as the run; 0 for a file)."""


def main() -> None:
    arguments = command_line.parse(EvaluateArguments)
    path = Path(arguments.model)
    folder = path if path.is_dir() else path.parent
    trained = config.read(path / "config.json") if (path / "config.json").exists() else RunConfig()
    given = {name: getattr(arguments, name) for name in ("data", "noise", "noise_level", "seed")}
    tested = dataclasses.replace(trained, **{name: value for name, value in given.items() if value is not None})

    command_line.load_tensorflow()
    from dae import denoiser, metrics

    model = denoiser.load_model(path)
    figure = Path(arguments.figure or folder / "evaluation.png")
    figures = denoiser.test(model, tested, datasets.load(tested).test, figure)
    print(f"{path} on {tested.noise} noise {tested.noise_level}: {metrics.in_words(figures)}")
    print(f"picture: {figure}")


if __name__ == "__main__":
    command_line.run(main)
