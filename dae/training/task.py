"""What a run is made of: its configuration, images, networks, loss and metrics, checked before anything is written."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import keras
import tensorflow as tf

from dae import plugins, runtime
from dae.config import RunConfig
from dae.data import datasets, noise
from dae.data.datasets import Arrays, Splits
from dae.data.examples import example_shape, examples_per_epoch
from dae.data.images import mean_brightness
from dae.data.pipeline import Batch, sample_batch, steps_per_epoch, training_batches
from dae.errors import UsageError, as_usage_error
from dae.evaluation import metrics
from dae.evaluation.evaluate import check_fits
from dae.losses import composite
from dae.losses import contract as loss_contract
from dae.losses.composite import CompositeLoss
from dae.losses.losses import Loss
from dae.losses.objective import Objective
from dae.models import contract as network_contract
from dae.models import networks
from dae.models.precision import in_precision
from dae.optimizers import optimizers
from dae.replicas import ALONE, Replicas
from dae.training import memory
from dae.workdir.model_files import load_model


@dataclasses.dataclass(frozen=True)
class Task:
    """The configuration as it will be recorded, and what it describes."""

    config: RunConfig
    data: Splits
    model: keras.Model
    evaluated_model: keras.Model
    """What is evaluated and exported: `model`, or with `ema_decay` the same network with averaged weights."""
    loss: CompositeLoss
    optimizer: keras.optimizers.Optimizer
    metrics: Mapping[str, Loss]

    @property
    def examples(self) -> int:
        """Images that an epoch trains on, or with `patch_size` patches."""
        return examples_per_epoch(self.data.train, self.config)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps per epoch."""
        return steps_per_epoch(self.examples, self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def objective(self, step: tf.Variable) -> Objective:
        """Return what is minimized; `step` counts the training steps done."""
        return Objective(self.loss, self.config, self.total_steps, step)

    def evaluated_objective(self, step: tf.Variable) -> Objective:
        """Return the same for `evaluated_model`, whose regularizers have other values if its weights are averages."""
        loss = composite.with_regularization(self.loss, self.evaluated_model)
        return Objective(loss, self.config, self.total_steps, step)

    @functools.cached_property
    def samples(self) -> Batch:
        """The first validation images, or training images if none validate, for TensorBoard; or patches of them."""
        validation, side = self.data.validation, self.config.patch_size or 0
        is_large = bool((validation.shapes.min(axis=1) >= side).any())
        return sample_batch(validation if is_large else self.data.train, self.config, "validation")


def prepare(config: RunConfig, data: Arrays | None = None, replicas: Replicas = ALONE) -> Task:
    """Load the images and build the network, the loss and the metrics; and wait for the other workers.

    `data` are the arrays that `config` records as PYTHON_DATA. Raises UsageError for whatever would make the run fail.
    """
    splits = datasets.load(config, data)
    if config.patience is not None and not len(splits.validation):
        raise UsageError("--patience: needs validation images; --validation-examples is 0")
    image_shape = example_shape(splits.train, config)
    sketch = networks.sketch(config, image_shape)
    has_state = sketch is not None and bool(sketch.non_trainable_weights)
    config = runtime.resolve(config, whole_batches=has_state, replicas=replicas)
    replicas.connect()
    config = noise.with_noise_level(config, splits.train)
    brightness = config.initial_brightness
    if brightness is None:
        brightness = round(min(max(mean_brightness(splits.train, config.value_range), 0.01), 0.99), 4)
    config = dataclasses.replace(
        config, data_digest=splits.digest, validation_examples=len(splits.validation), initial_brightness=brightness
    )
    noise.check(config, image_shape)
    model = networks.build(config, image_shape, earlier=sketch)
    memory.check(config, model, splits, replicas.workers)
    if config.precision != "float32":
        in_precision(model, config.precision)  # may refuse the network
    # Of the last worker, on all workers; if there are few images, the first can have none.
    last = dataclasses.replace(replicas, worker=replicas.workers - 1)
    (batch,) = training_batches(splits.train, config, replicas=last).take(1)
    if config.model not in networks.MODELS:
        network_contract.check(config, model, batch)
    if config.start_from is not None:
        config = load_initial_weights(config, model)
    evaluated_model = model
    if config.ema_decay is not None:
        evaluated_model = networks.build(config, image_shape)
        evaluated_model.set_weights(model.get_weights())

    def loss() -> CompositeLoss:
        return composite.with_regularization(composite.build(config.loss, config.seed), model)

    total_steps = config.epochs * steps_per_epoch(examples_per_epoch(splits.train, config), config.batch_size)
    optimizer = optimizers.build(config, total_steps)
    task = Task(config, splits, model, evaluated_model, loss(), optimizer, metrics.load(config, batch))
    if splits.train.is_paired and (needed := task.loss.inputs & {"second_noisy", "corrupt", "noise_level"}):
        raise UsageError(
            f"--loss: {plugins.source(config.loss)} takes `{min(needed)}`, of noise that is added to clean images; it "
            "cannot be used with pairs of noisy and clean images"
        )
    for part in (splits.validation, splits.test):
        check_fits(evaluated_model, part)
    objective = task.objective(tf.Variable(0, dtype=tf.int64))
    loss_contract.check(objective, model, batch)
    loss_contract.check_initial_weights(objective, dataclasses.replace(objective, loss=loss()), model, batch)
    return task


def load_initial_weights(config: RunConfig, model: keras.Model) -> RunConfig:
    """Give `model` the weights that `config.start_from` names, and return `config` with their digest.

    Raises UsageError if they are those of another network, or differ from those that `config` records.
    """
    flag = f"--start-from: {config.start_from}"
    with as_usage_error("--start-from"):
        loaded = load_model(Path(config.start_from or ""))
    shapes, expected = ([weight.shape for weight in each.weights] for each in (loaded, model))
    if shapes != expected:
        raise UsageError(
            f"{flag}: weights of another network than --model {plugins.source(config.model)}, or of other images"
        )
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in loaded.get_weights())).hexdigest()
    if config.weights_digest not in (None, digest):
        raise UsageError(
            f"{flag}: other weights than the run started from (expected {config.weights_digest}, got {digest})"
        )
    model.set_weights(loaded.get_weights())
    return dataclasses.replace(config, weights_digest=digest)
