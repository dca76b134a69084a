"""What a run is made of: its configuration, images, model and loss, all checked before anything is written."""

import dataclasses
import functools

import keras

from dae import runtime
from dae.config import RunConfig
from dae.data import datasets, noise
from dae.data.datasets import Splits
from dae.data.pipeline import Batch, sample_batch, steps_per_epoch, training_batches
from dae.losses import composite, contract
from dae.losses.composite import CompositeLoss
from dae.losses.losses import Loss
from dae.models import networks


@dataclasses.dataclass(frozen=True)
class Task:
    """The configuration as it will be recorded, and what it describes."""

    config: RunConfig
    data: Splits
    model: keras.Model
    loss: CompositeLoss

    @property
    def steps_per_epoch(self) -> int:
        """Training steps per epoch."""
        return steps_per_epoch(len(self.data.train), self.config.batch_size)

    @functools.cached_property
    def samples(self) -> Batch:
        """The first (noisy, clean) validation images, or training images if none validate, for TensorBoard."""
        images = self.data.validation if len(self.data.validation) else self.data.train
        return sample_batch(images, self.config, "validation")


def prepare(config: RunConfig, loss_function: Loss | None = None) -> Task:
    """Load the images and build the model and the loss; `loss_function` is the Python function that `config` records.

    Raises UsageError for whatever would make the run fail.
    """
    config = runtime.resolve(config)
    data = datasets.load(config)
    config = dataclasses.replace(config, data_digest=data.digest, validation_examples=len(data.validation))
    model = networks.build(config, data.image_shape)
    loss = composite.build(config.loss, loss_function)
    noise.check(config, data.image_shape)
    if not all(term.is_builtin for term in loss.terms):
        noisy, clean = next(iter(training_batches(data.train, config).take(1)))
        contract.check(loss, clean, model(noisy))
    return Task(config, data, model, loss)
