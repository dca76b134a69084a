"""Small runs that several tests share: users' files, data, and a table of configurations that each combine features.

Together the rows have everything random that there is: shuffling, patches, flips and rotations, noise levels, each
noise model, Dropout, initial weights, and the inputs `seed` and `second_noisy` of a loss.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from helpers import small_network
from PIL import Image

from dae.config import PRESETS, RunConfig

NETWORKS = """
import keras
from keras import layers


def plain(image_shape):
    noisy = keras.Input(image_shape)
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="encoder")(noisy)
    return keras.Model(noisy, layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid")(x))


def normalized(image_shape):
    noisy = keras.Input(image_shape)
    x = layers.Conv2D(4, 3, strides=2, padding="same", kernel_regularizer=keras.regularizers.L2(0.1))(noisy)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.Dropout(0.3, name="encoder")(x)
    return keras.Model(noisy, layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid")(x))
"""

METRICS = """
import tensorflow as tf


def largest_error(clean, denoised):
    return tf.reduce_max(tf.abs(clean - denoised), axis=[1, 2, 3])
"""

LOSSES = """
import keras
import tensorflow as tf


def masked(clean, denoised, *, seed, progress, second_noisy):
    weights = tf.random.stateless_uniform(tf.shape(clean), seed)
    errors = tf.square(clean - denoised) + progress * tf.abs(second_noisy - denoised)
    return tf.reduce_mean(weights * errors, axis=[1, 2, 3])


class Learned(keras.Layer):
    '''A squared error with a weight that is trained with the network.'''

    def __init__(self):
        super().__init__()
        self.log_scale = self.add_weight(initializer="random_normal")

    def call(self, clean, denoised):
        error = tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
        return tf.exp(-self.log_scale) * error + self.log_scale


class Moving(keras.Layer):
    '''An absolute error, times a weight that `update` moves to the mean brightness of denoised images.'''

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(initializer="ones", trainable=False)

    def call(self, clean, denoised):
        return self.scale * tf.reduce_mean(tf.abs(clean - denoised), axis=[1, 2, 3])

    def update(self, clean, denoised, *, noisy, denoise):
        self.scale.assign(0.9 * self.scale + 0.05 * tf.reduce_mean(denoised) + 0.05 * tf.reduce_mean(denoise(noisy)))
"""

NOISES = """
import tensorflow as tf


def flat(clean, level, seed):
    return tf.reshape(clean, [-1])
"""


def squared_error(clean, denoised):
    return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])


def darker(clean, level, seed):
    return clean * (1 - level * tf.random.stateless_uniform(tf.shape(clean), seed))


def smallest_error(clean, denoised):
    return tf.reduce_min(tf.abs(clean - denoised), axis=[1, 2, 3])


# Sizes of the pairs of pictures in each split.
PAIR_SIZES = {
    "train": [(40, 30), (28, 57), (16, 16), (33, 64), (50, 50), (31, 29)],
    "val": [(30, 41), (20, 14)],
    "test": [(30, 41), (20, 14), (20, 14)],
}


def write_files(folder: Path, digits: np.ndarray) -> None:
    """Write the users' files; the centres of MNIST's `digits` as digits.npz; and pairs/, pictures of 12 bits."""
    folder.mkdir()
    for name, text in (("networks", NETWORKS), ("metrics", METRICS), ("losses", LOSSES), ("noises", NOISES)):
        (folder / f"{name}.py").write_text(text)
    shutil.copy(Path(__file__).parent / "published.py", folder)
    centres = digits[:144, 6:22, 6:22, 0]
    np.savez(folder / "digits.npz", x_train=centres[:140], x_test=centres[140:144])
    rng, number = np.random.default_rng(0), 0
    for split, sizes in PAIR_SIZES.items():
        for height, width in sizes:
            clean = np.tile(digits[number, ..., 0].astype(np.float64) * 4095 / 255, (2, 3))[:height, :width]
            noisy = np.clip(clean + rng.normal(0, 600, clean.shape), 0, 4095)
            for role, pixels in (("clean", clean), ("noisy", noisy)):
                path = folder / "pairs" / split / role / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.rint(pixels).astype(np.uint16)).save(path)
            number += 1


# A row is the changes to SMALL, where {} stands for the folder of the files.
Row = dict[str, Any]

# Two epochs of seven steps, the last of them with 4 images.
SMALL: Row = {
    "data": "{}/digits.npz",
    "model": "{}/networks.py:plain",
    "validation_examples": 40,
    "batch_size": 16,
    "epochs": 2,
    "checkpoint_every": 4,
    "bce_steps": 0,
    "shards": 2,
}

ROWS: dict[str, Row] = {
    "plain": {"noise": "uniform"},
    "network": {
        "model": "{}/networks.py:normalized",
        "metrics": ("{}/metrics.py:largest_error",),
        "ema_decay": 0.6,
        "noise": "poisson",
        "noise_level": (0.01, 0.5),
        "patience": 1,
        "shards": None,
    },
    "pairs": {
        "data": "{}/pairs",
        "validation_examples": None,
        "value_range": (0, 4095),
        "patch_size": 16,
        "augment": True,
        "batch_size": 8,
        "checkpoint_every": 2,
        "loss": "mae",
        "bce_steps": 2,
    },
    # BCE still has a weight when the run is resumed.
    "sum": {
        "loss": "bce + 0.5*{}/losses.py:masked + {}/losses.py:Learned + 0.1*{}/losses.py:Moving",
        "bce_steps": 13,
        "shards": None,
        "optimizer": "soap",
        "schedule": "cosine",
        "warmup_ratio": 0.3,
        "max_gradient_norm": 0.1,
        "noise": "speckle",
        "noise_level": (0.1, 1),
        "clip_noise": False,
        "augment": True,
    },
    "functions": {
        "loss": squared_error,
        "noise": darker,
        "model": small_network,
        "metrics": (smallest_error,),
        "shards": 3,
    },
    "start_from": {"start_from": "{}/start.keras", "noise": "masking", "seed": 3, "shards": 4, "optimizer": "soap"},
    "bfloat16": {
        "precision": "bfloat16",
        "optimizer": "lion",
        "noise": "salt_pepper",
        "model": "{}/networks.py:normalized",
    },
    "photo": {
        **PRESETS["photo"],
        "model": "{}/published.py:nafnet",  # residual and linear too, and of fewer layers
        "data": None,
        "clean": "{}/pairs/train/clean",
        "value_range": (0, 4095),
        "validation_examples": 2,
        "patch_size": 16,
        "batch_size": 4,
        "epochs": 2,
        "checkpoint_every": 2,
    },
    "noisy": {
        "data": None,
        "noisy": "{}/pairs/train/noisy",
        "value_range": (0, 4095),
        "validation_examples": 2,
        "patch_size": 16,
        "augment": True,
        "batch_size": 4,
        "checkpoint_every": 2,
        "loss": "neighbor2neighbor + noise2void + sure",
        "noise_level": 0.15,
        "optimizer": "adamw",
    },
    # Networks as they are published, each with another optimizer.
    "published_dncnn": {
        "model": "{}/published.py:dncnn",
        "loss": "mse",
        "bce_steps": 2,
        "optimizer": "{}/published.py:momentum",
        "schedule": "{}/published.py:halving",
        "shards": None,
    },
    "published_nafnet": {"model": "{}/published.py:nafnet", "loss": "charbonnier", "optimizer": "lion"},
    "published_attention": {"model": "{}/published.py:attention", "optimizer": "{}/published.py:accumulating"},
    "published_spectral": {"model": "{}/published.py:spectral", "optimizer": "muon", "ema_decay": 0.9, "shards": None},
    "published_times": {"model": "{}/published.py:times", "optimizer": "adamw"},
    "published_variational": {"model": "{}/published.py:variational", "optimizer": "nadam"},
}


def config_of(folder: Path, name: str = "", **changes: Any) -> RunConfig:
    """Return the configuration of a row, by default SMALL itself, with the files in `folder`."""

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    row = {**SMALL, **ROWS.get(name, {}), **changes}
    return RunConfig(**{field: filled(value) for field, value in row.items()})
