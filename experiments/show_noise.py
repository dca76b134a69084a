"""Plot noise models and levels on real images: `python experiments/show_noise.py`; `--help` lists the flags."""

import dataclasses
from pathlib import Path

from dae import cli


@dataclasses.dataclass(frozen=True)
class ShowNoiseArguments(cli.ConfigArguments, cli.PresetArguments):
    """Plot the first test image that the flags of run.py name, with each noise model at each level.

    Of these flags, only those of the data, --clip-noise and --seed matter. Values outside [0, 1] are drawn as black or
    white.
    """

    noises: tuple[str, ...] | None = None
    """Noise models, one per row; None: all."""
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Levels, one per column."""
    output: str = "noise.png"
    """PNG file to write."""


def main() -> None:
    arguments = cli.parse_config(ShowNoiseArguments)
    config = dataclasses.replace(arguments.config, validation_examples=0)
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
