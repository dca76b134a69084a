"""Train the network of perceptual.py to classify digits: `python experiments/examples/train_features.py`.

features.keras was written with Keras 3.12, the oldest supported version: newer ones read it, but not the reverse.
"""

import dataclasses
from pathlib import Path

from dae import cli
from dae.config import RunConfig


@dataclasses.dataclass(frozen=True)
class FeaturesArguments:
    """Train a small classifier of MNIST with Keras, and save its first layers."""

    epochs: int = 5
    """Passes over the training images."""
    train_examples: int | None = None
    """Train on the first N images only; None: all images that are not used for validation."""
    output: str = str(Path(__file__).parent / "features.keras")
    """Path of the network to write."""


def main() -> None:
    arguments = cli.parse(FeaturesArguments)
    cli.import_tensorflow()
    import keras
    import numpy as np

    from dae.data import datasets

    config = RunConfig(train_examples=arguments.train_examples)
    splits = datasets.load(config)
    with np.load(datasets.MNIST_FILE) as arrays:
        labels = arrays["y_train"]
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 1))
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(image)
    features = keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(64, 3, activation="relu")(features))
    classifier = keras.Model(image, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adam", loss, metrics=["accuracy"])
    images = splits.train.pixels.astype("float32") / 255
    classifier.fit(images, labels[: len(images)], batch_size=128, epochs=arguments.epochs, verbose=2)
    keras.Model(image, features).save(arguments.output)
    print(f"features: {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
