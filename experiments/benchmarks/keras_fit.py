"""The tutorial that this project starts from, to compare with: `compile`, `fit`, and noise that is made once."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dae import cli
from dae.config import PRESETS, RunConfig
from dae.data import datasets


@dataclasses.dataclass(frozen=True)
class TutorialArguments:
    """Train the network with Keras's `fit`, as the tutorial does; test the result with experiments/evaluate.py."""

    output: str = "tutorial.h5"
    """Where to write the model."""
    epochs: int = 50
    """Passes over the training images."""


def compiled(config: RunConfig) -> Any:
    """The network, a keras.Model, as the tutorial compiles it."""
    import keras

    from dae.models import networks

    keras.utils.set_random_seed(config.seed)
    model = networks.build(config, datasets.load(config).image_shape)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


def with_noise(images: np.ndarray, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """(noisy, clean), float32 in [0, 1], of uint8 images, from NumPy's global random numbers."""
    clean = images.astype(np.float32) / 255
    noisy = np.clip(clean + np.random.normal(0, config.noise_level, clean.shape), 0, 1)
    return noisy.astype(np.float32), clean


def main() -> None:
    arguments = cli.parse(TutorialArguments)
    config = PRESETS["tutorial"]
    cli.load_tensorflow(config)
    from dae.workdir import model_files, workdir

    output = Path(arguments.output)
    workdir.check_output(output, (".h5", ".keras"), "--output")
    model, splits = compiled(config), datasets.load(config)
    model.fit(
        *with_noise(splits.train, config),
        epochs=arguments.epochs,
        batch_size=config.batch_size,
        shuffle=True,
        validation_data=with_noise(splits.test, config),
        verbose=2,
    )
    model_files.save_model(model, output)


if __name__ == "__main__":
    cli.run(main)
