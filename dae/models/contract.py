"""The contract of a network, checked on real images before a run writes anything."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.data.pipeline import Batch
from dae.errors import UsageError, first_line
from dae.models import networks
from dae.plugins import errors_with_line, file_of
from dae.workdir.model_files import MODEL_FILES, save_model


def check(config: RunConfig, model: keras.Model, batch: Batch) -> None:
    """Check `model`, which was built for `config`, on a batch of training images.

    The network must return finite values in [0, 1], have a gradient for every weight, and have the same initial weights
    whenever it is built; and plain Keras must save and load it. Otherwise UsageError is raised, which names the file
    and the function.
    """
    source = f"--model: {plugins.source(config.model)}"
    with errors_with_line(source, file_of(networks.load(config))):
        _check_values(source, model, batch)
        again = networks.build(config, batch.clean.shape[1:], earlier=model)
        for weight, other in zip(model.weights, again.weights, strict=True):
            if not np.array_equal(weight, other):
                raise UsageError(
                    f"{source}: the initial values of {weight.path} differ whenever it is built; draw them with "
                    "Keras's initializers, whose seeds are a function of --seed"
                )
        _check_files(source, model, batch.noisy[:4])


def _check_values(source: str, model: keras.Model, batch: Batch) -> None:
    denoised = model(batch.noisy, training=False).numpy()
    if not np.isfinite(denoised).all():
        raise UsageError(f"{source}: expected finite values, got {denoised[~np.isfinite(denoised)][0]}")
    if denoised.min() < 0 or denoised.max() > 1:
        raise UsageError(
            f"{source}: expected values in [0, 1], got {denoised.min():.3g} to {denoised.max():.3g}; end in a sigmoid"
        )
    if not model.trainable_weights:
        raise UsageError(f"{source}: has no weights to train")
    state = [weight.numpy() for weight in model.non_trainable_variables]
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(batch.noisy, training=True))
    gradients = tape.gradient(total, [weight.value for weight in model.trainable_weights])
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        if gradient is None:
            raise UsageError(f"{source}: no gradient with respect to {weight.path}; the output does not depend on it")
        if not np.isfinite(gradient).all():
            raise UsageError(f"{source}: expected a finite gradient with respect to {weight.path}")
    for weight, before in zip(model.non_trainable_variables, state, strict=True):  # such as those of BatchNormalization
        weight.assign(before)


def _check_files(source: str, model: keras.Model, noisy: tf.Tensor) -> None:
    foreign = [layer for layer in model._flatten_layers() if not type(layer).__module__.startswith("keras.")]
    if foreign:
        raise UsageError(
            f"{source}: plain Keras cannot load the layer {foreign[0].name} of the class {type(foreign[0]).__name__}; "
            "use layers of keras.layers only"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in MODEL_FILES:
            path = Path(folder) / name
            try:
                save_model(model, path)
                with _nothing_registered():
                    loaded = keras.models.load_model(path, compile=False)
                same = np.allclose(loaded(noisy, training=False), model(noisy, training=False), atol=1e-6)
            except Exception as error:  # of many types
                raise UsageError(
                    f"{source}: plain Keras cannot load it from {name} ({type(error).__name__}: "
                    f"{first_line(error)}); use layers of keras.layers only, not keras.ops or Lambda"
                ) from None
            if not same:
                raise UsageError(f"{source}: gives other results after plain Keras has loaded it from {name}")


@contextlib.contextmanager
def _nothing_registered() -> Iterator[None]:
    """Hide functions and classes that the user's file has registered with Keras, which another process would lack."""
    registered = keras.saving.get_custom_objects()
    hidden = dict(registered)
    registered.clear()
    try:
        yield
    finally:
        registered.update(hidden)
