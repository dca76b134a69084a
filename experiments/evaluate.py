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
    clip_noise: bool | None = None
    """Clip noisy images to [0, 1] (default: as the run; True for a file)."""
    seed: int | None = None
    """Decides the noise (default: as the run; 0 for a file)."""


def main() -> None:
    arguments = command_line.parse(EvaluateArguments)
    path = Path(arguments.model)
    trained = config.read(path / "config.json") if path.is_dir() else RunConfig()
    changes = {name: getattr(arguments, name) for name in ("noise", "noise_level", "clip_noise", "seed")}
    tested = dataclasses.replace(trained, **{name: value for name, value in changes.items() if value is not None})
    if arguments.data is not None:
        tested = dataclasses.replace(
            tested, data=arguments.data, data_digest=None, train_examples=None, validation_examples=0
        )

    tested = command_line.load_tensorflow(tested)
    from dae import denoiser, metrics, run_directory

    figure = Path(arguments.figure or (path if path.is_dir() else path.parent) / "evaluation.png")
    run_directory.check_output(figure, (".png",), "--figure")
    model = denoiser.load_model(path)
    evaluate = metrics.evaluator(model, None, tested.micro_batches or 1)
    figures = denoiser.test(model, evaluate, tested, datasets.load(tested).test, figure)
    clipped = "clipped" if tested.clip_noise else "not clipped"
    print(f"{path} on {tested.noise} noise {tested.noise_level}, {clipped}: {metrics.in_words(figures)}")
    print(f"picture: {figure}")


if __name__ == "__main__":
    command_line.run(main)
