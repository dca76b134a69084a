"""Plot noise models and levels on real images: `python experiments/show_noise.py`; `--help` lists the flags."""

import dataclasses
from pathlib import Path

from dae import cli
from dae.config import RunConfig


@dataclasses.dataclass(frozen=True)
class ShowNoiseArguments:
    """Plot an image with each noise model at each level."""

    noises: tuple[str, ...] | None = None
    """Noise models, one per row; None: all."""
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Levels, one per column."""
    output: str = "noise.png"
    """PNG file to write."""
    dataset: str = "mnist"
    """As --dataset of run.py."""
    data: str | None = None
    """As --data of run.py."""
    image_size: int | tuple[int, int] | None = None
    """As --image-size of run.py."""
    clip_noise: bool = True
    """Clip noisy images to [0, 1]; values outside are drawn as black or white in any case."""
    seed: int = 0
    """Seed of the noise."""


def main() -> None:
    arguments = cli.parse(ShowNoiseArguments)
    names = ("dataset", "data", "image_size", "clip_noise", "seed")
    config = RunConfig(validation_examples=0, **{name: getattr(arguments, name) for name in names})
    cli.import_tensorflow()
    from dae import plugins
    from dae.data import datasets, noise, pipeline
    from dae.files import check_output
    from dae.reporting import plots

    check_output(Path(arguments.output), (".png",), "--output")
    image = datasets.load(config).test[:1]
    noises = arguments.noises or tuple(noise.NOISES)
    rows: dict[str, list] = {label: [] for label in plugins.unique_names(map(plugins.label, noises))}
    for name, row in zip(noises, rows.values(), strict=True):
        for level in arguments.noise_levels:
            settings = dataclasses.replace(config, noise=name, noise_level=level)
            noise.check(settings, (*image.shapes[0], image.channels), (level, level))
            row.append(pipeline.sample_batch(image, settings, "shown").noisy[0].numpy())
    plots.save_grid(Path(arguments.output), rows, [f"level {level:g}" for level in arguments.noise_levels])
    print(f"plot: {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
