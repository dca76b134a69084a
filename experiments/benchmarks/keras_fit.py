"""The tutorial that this project started from, as a baseline: `compile`, `fit`, and noise that is made once."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dae import cli
from dae.config import RunConfig, preset
from dae.data import datasets

NOISE_LEVEL = 0.5


@dataclasses.dataclass(frozen=True)
class KerasFitArguments:
    """Train the network with Keras's `fit`, as the tutorial does; evaluate the result with experiments/evaluate.py."""

    output: str = "keras_fit.h5"
    """Path of the model to write."""
    epochs: int = 50
    """Passes over the training images."""
    train_examples: int | None = None
    """Train on the first N images only; None: all."""


def compiled(config: RunConfig) -> Any:
    """Return the network, a keras.Model, compiled as in the tutorial."""
    import keras

    from dae.models import networks

    keras.utils.set_random_seed(config.seed)
    model = networks.build(config, datasets.load(config).train.image_shape)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


def with_noise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (noisy, clean), float32 in [0, 1], for uint8 images, with NumPy's global random numbers."""
    clean = images.astype(np.float32) / 255
    noisy = np.clip(clean + np.random.normal(0, NOISE_LEVEL, clean.shape), 0, 1)
    return noisy.astype(np.float32), clean


def main() -> None:
    arguments = cli.parse(KerasFitArguments)
    config = preset("tutorial", train_examples=arguments.train_examples)
    cli.import_tensorflow()
    from dae.files import check_output
    from dae.workdir.model_files import save_model

    output = Path(arguments.output)
    check_output(output, (".h5", ".keras"), "--output")
    model, splits = compiled(config), datasets.load(config)
    model.fit(
        *with_noise(splits.train.pixels),
        epochs=arguments.epochs,
        batch_size=config.batch_size,
        shuffle=True,
        validation_data=with_noise(splits.test.pixels),
        verbose=2,
    )
    save_model(model, output)


if __name__ == "__main__":
    cli.run(main)
