"""What a run is made of: its configuration, images, model and loss, all checked before anything is written."""

import dataclasses
import functools

import keras
import tensorflow as tf

from dae import runtime
from dae.config import RunConfig
from dae.data import datasets, noise
from dae.data.datasets import Splits
from dae.data.pipeline import Batch, sample_batch, steps_per_epoch, training_batches
from dae.losses import composite, contract
from dae.losses.composite import CompositeLoss
from dae.losses.losses import Loss
from dae.losses.objective import Objective
from dae.models import networks
from dae.optimizers import optimizers


@dataclasses.dataclass(frozen=True)
class Task:
    """The configuration as it will be recorded, and what it describes."""

    config: RunConfig
    data: Splits
    model: keras.Model
    loss: CompositeLoss
    optimizer: keras.optimizers.Optimizer

    @property
    def steps_per_epoch(self) -> int:
        """Training steps per epoch."""
        return steps_per_epoch(len(self.data.train), self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def objective(self, step: tf.Variable) -> Objective:
        """Return what is minimized; `step` counts the training steps done."""
        return Objective(self.loss, self.config, self.total_steps, step)

    @functools.cached_property
    def samples(self) -> Batch:
        """The first validation images, or training images if none validate, for TensorBoard."""
        images = self.data.validation if len(self.data.validation) else self.data.train
        return sample_batch(images, self.config, "validation")


def prepare(config: RunConfig, loss_function: Loss | None = None) -> Task:
    """Load the images and build the model and the loss; `loss_function` is the Python function that `config` records.

    Raises UsageError for whatever would make the run fail.
    """
    config = runtime.resolve(config)
    data = datasets.load(config)
    brightness = config.initial_brightness
    if brightness is None:
        brightness = round(min(max(data.train.mean() / 255, 0.01), 0.99), 4)
    config = dataclasses.replace(
        config, data_digest=data.digest, validation_examples=len(data.validation), initial_brightness=brightness
    )
    model = networks.build(config, data.image_shape)
    noise.check(config, data.image_shape)
    loss = composite.build(config.loss, config.seed, loss_function)
    total_steps = config.epochs * steps_per_epoch(len(data.train), config.batch_size)
    task = Task(config, data, model, loss, optimizers.build(config, total_steps))
    (batch,) = training_batches(data.train, config).take(1)
    objective = task.objective(tf.Variable(0, dtype=tf.int64))
    contract.check(objective, model, batch)
    again = dataclasses.replace(objective, loss=composite.build(config.loss, config.seed, loss_function))
    contract.check_initial_weights(objective, again, model, batch)
    return task
