"""The tutorial that this project starts from, to compare with: `compile`, `fit`, and noise that is made once."""

import dataclasses
from pathlib import Path

import numpy as np

from dae import command_line, datasets
from dae.config import PRESETS


@dataclasses.dataclass(frozen=True)
class TutorialArguments:
    """Train the network with Keras's `fit`, as the tutorial does; test the result with experiments/evaluate.py."""

    output: str = "tutorial.h5"
    """Where to write the model."""
    epochs: int = 50
    """Passes over the training images."""


def main() -> None:
    arguments = command_line.parse(TutorialArguments)
    config = PRESETS["tutorial"]
    command_line.load_tensorflow(config)
    import keras

    from dae import denoiser, models, run_directory

    output = Path(arguments.output)
    run_directory.check_output(output, (".h5", ".keras"), "--output")
    keras.utils.set_random_seed(config.seed)
    splits = datasets.load(config)
    model = models.build(config, splits.image_shape)
    clean, clean_test = (images.astype(np.float32) / 255 for images in (splits.train, splits.test))
    noisy, noisy_test = (
        np.clip(images + np.random.normal(0, 0.5, images.shape), 0, 1).astype(np.float32)
        for images in (clean, clean_test)
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    model.fit(
        noisy,
        clean,
        epochs=arguments.epochs,
        batch_size=config.batch_size,
        shuffle=True,
        validation_data=(noisy_test, clean_test),
        verbose=2,
    )
    denoiser.save_model(model, output)


if __name__ == "__main__":
    command_line.run(main)
