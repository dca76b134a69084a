"""`Task`: images, networks, loss, optimizer and metrics of a run, checked before anything is written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import tensorflow as tf

from dae import machine, plugins, runtime
from dae.config import PYTHON_DATA, RunConfig
from dae.data import datasets, noise, noise_level
from dae.data.datasets import Arrays, Splits
from dae.data.images import example_shape, examples_per_epoch, mean_brightness
from dae.data.pipeline import Batch, evaluation_batches, sample_batch, steps_per_epoch, training_batches
from dae.errors import UsageError, as_usage_error, warn
from dae.evaluation import metrics
from dae.evaluation.evaluate import check_fits
from dae.losses import composite
from dae.losses import contract as loss_contract
from dae.losses.composite import CompositeLoss, ImageFunction
from dae.losses.losses import bce
from dae.losses.objective import Objective
from dae.losses.self_supervised import sure
from dae.models import networks
from dae.models.fused_layers import SeededNetwork, for_training
from dae.optimizers import optimizers
from dae.replicas import ALONE, Replicas
from dae.resolved import Resolved
from dae.training.train_state import TrainState
from dae.workdir.model_files import load_model, weights_digest


@dataclasses.dataclass(frozen=True)
class Task:
    """A configuration, and all that it describes."""

    config: RunConfig
    resolved: Resolved
    replicas: Replicas
    data: Splits
    model: keras.Model
    evaluated_model: keras.Model
    """The network that is evaluated and exported: `model`, or with `ema_decay` the same one with averaged weights."""
    network: SeededNetwork
    """`model` as the train step calls it."""
    loss: CompositeLoss
    optimizer: keras.optimizers.Optimizer
    metrics: Mapping[str, ImageFunction]
    is_bounded: bool
    """True if the outputs of the network are always in [0, 1]."""

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

    @property
    def criterion(self) -> str:
        """The name of the value in metrics.jsonl that selects the model: the epoch where it is lowest.

        A loss against noisy images cannot: Neighbor2Neighbor, for example, is lowest for the identity.
        """
        return "validation_loss" if self.data.train.has_clean else "validation_blind_spot_error"

    @property
    def is_mostly_warmup(self) -> bool:
        """True if BCE is mixed into the loss in more than half of the steps."""
        warms_up = self.objective(tf.Variable(0, dtype=tf.int64)).warms_up
        return warms_up and 2 * self.config.bce_steps > self.total_steps

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints within an epoch; by default there are none."""
        return self.config.checkpoint_every or self.steps_per_epoch

    def new_state(self) -> TrainState:
        """Return the train state before the first step."""
        averaged_model = self.evaluated_model if self.evaluated_model is not self.model else None
        norm, decay = self.config.max_gradient_norm, self.config.ema_decay
        return TrainState(self.model, self.loss, self.optimizer, norm, averaged_model, decay)

    def objective(self, step: tf.Variable) -> Objective:
        """Return what is minimized; `step` counts the training steps done."""
        corrupt = noise.corruption(self.config, self.resolved.noise_level[1])
        return Objective(self.loss, self.config, corrupt, self.total_steps, step, self.is_bounded)

    def evaluated_objective(self, step: tf.Variable) -> Objective:
        """Return the same for `evaluated_model`, whose regularizers have other values if its weights are averages."""
        loss = composite.with_regularization(self.loss, self.evaluated_model)
        return dataclasses.replace(self.objective(step), loss=loss)

    @functools.cached_property
    def train_sample(self) -> list[Batch]:
        """A batch of the first training images, or of patches of them, on which the training metrics are computed."""
        return [sample_batch(self.data.train, self.config, "train evaluation")][: 1 if self.replicas.is_chief else 0]

    @functools.cached_property
    def batches(self) -> Callable[[str], tf.data.Dataset]:
        """The function from `validation` or `test` to the batches of this split that this worker evaluates.

        The batches of a split are made once: it copies the images and traces a graph, part of which is never freed.
        """
        worker, workers = self.replicas.worker, self.replicas.workers
        return functools.cache(
            lambda split: evaluation_batches(getattr(self.data, split), self.config, split, worker, workers)
        )

    @functools.cached_property
    def samples(self) -> Batch:
        """The first validation images, or patches of them, for TensorBoard; training images if none is large enough."""
        validation, side = self.data.validation, self.config.patch_size or 0
        is_large = bool((validation.shapes.min(axis=1) >= side).any())
        return sample_batch(validation if is_large else self.data.train, self.config, "validation")


def prepare(
    config: RunConfig, data: Arrays | None = None, replicas: Replicas = ALONE, recorded: Resolved | None = None
) -> Task:
    """Load the images and build the network, the loss and the metrics; and wait for the other workers.

    `data` are the arrays that `config` records as PYTHON_DATA, and `recorded` is what an earlier run derived, which is
    resumed or repeated. Raises UsageError for whatever would make the run fail.
    """
    splits = datasets.load(config, data)
    if config.patience is not None and not len(splits.validation):
        raise UsageError("--patience: needs validation images; --validation-examples is 0")
    image_shape = example_shape(splits.train, config)
    sketch = networks.sketch(config, image_shape)
    needs_whole_batches = composite.has_updates(config.loss) or bool(sketch and sketch.non_trainable_weights)
    shards, threads, onednn = runtime.resolve(config, needs_whole_batches, replicas, recorded, image_shape)
    replicas = replicas.with_shards(shards)
    replicas.connect()
    found = None
    if config.only_noisy and recorded is not None and recorded.data_digest:
        splits = splits.with_noise_level(recorded.noise_level[0])
    elif config.only_noisy and config.noisy != PYTHON_DATA:  # the noise in arrays is known to their caller
        found = noise_level.of_images(splits.train)
    # That of the chief, because those of other processors may differ in the last digit.
    estimate, *_ = replicas.exchange(b"" if found is None else f"{found.sigma:.5f}".encode())
    if found is not None and estimate:
        splits = splits.with_noise_level(float(estimate), f"noise: {found.describe()}")
    levels = noise.level_range(config, splits.train.is_noisy, splits.train.noise_level)
    noise.check(config, image_shape, levels)
    model = networks.build(config, image_shape, earlier=sketch)
    network = for_training(model, config.precision)
    (batch,) = training_batches(splits.train, config).take(1)
    if config.model not in networks.MODELS:
        networks.check(config, model, batch)
        model(batch.noisy[:1], training=False)  # the model has losses of activities only after a call
    is_bounded = networks.is_bounded(config, model, batch.noisy)
    brightness = config.initial_brightness
    if brightness is None:
        brightness = round(min(max(mean_brightness(splits.train), 0.01), 0.99), 4)
    networks.set_brightness(model, brightness)
    weights_digest = "" if config.start_from is None else load_initial_weights(config, model)
    evaluated_model = model
    if config.ema_decay is not None:
        evaluated_model = networks.build(config, image_shape)
        evaluated_model.set_weights(model.get_weights())

    resolved = Resolved(
        levels,
        brightness,
        image_shape,
        splits.train.value_range,
        len(splits.validation),
        shards,
        threads,
        onednn,
        splits.digest,
        weights_digest,
        machine.variables(),
    )
    if recorded is not None:
        check_recorded(config, resolved, recorded)
    total_steps = config.epochs * steps_per_epoch(examples_per_epoch(splits.train, config), config.batch_size)
    optimizer = optimizers.build(config, total_steps)
    optimizers.check(config, total_steps, model.trainable_variables)
    task = Task(
        config,
        resolved,
        replicas,
        data=splits,
        model=model,
        evaluated_model=evaluated_model,
        network=network,
        loss=composite.with_regularization(composite.build(config.loss, config.seed), model),
        optimizer=optimizer,
        metrics=metrics.load(config, splits.train.has_clean),
        is_bounded=is_bounded,
    )
    for images in (splits.validation, splits.test):
        check_fits(evaluated_model, images)
    check_loss(task)
    objective = task.objective(tf.Variable(0, dtype=tf.int64))
    loss_contract.check(objective, model, batch)
    metrics.check(task.metrics, objective, model, batch)
    again = dataclasses.replace(objective, loss=composite.build(config.loss, config.seed))
    loss_contract.check_initial_weights(objective, again, model, batch)
    if found is not None and (problems := found.problems("noise_level" in task.loss.inputs)):
        warn(f"{datasets.source(config)}: {'; '.join(problems)} (docs/data.md)")
    return task


def check_loss(task: Task) -> None:
    """Raise UsageError if the loss or a metric does not fit the images, the network or the shards of the run.

    Warns if the BCE warm-up is most of the run, and of a loss that may have no minimum.
    """
    source = f"--loss: {plugins.source(task.config.loss)}"
    if not task.is_bounded and any(term.function is bce for term in task.loss.terms):
        raise UsageError(
            f"{source} is defined for outputs in [0, 1], which --model {plugins.source(task.config.model)} can leave; "
            "use --loss mse or charbonnier, or end the network in a sigmoid"
        )
    if not task.is_bounded and any(term.function is sure for term in task.loss.terms):
        warn(f"{source}: can fall without end with a network whose outputs can leave [0, 1]; use recorrupted instead")
    added = {"second_noisy", "corrupt"} | ({"noise_level"} if task.data.train.is_paired else set())
    asked = {source: task.loss.inputs} | {metric.prefix: {*metric.inputs} for metric in task.metrics.values()}
    for prefix, inputs in asked.items():
        if task.data.train.is_noisy and (needed := inputs & added):
            raise UsageError(
                f"{prefix} takes `{min(needed)}`, of noise that is added to clean images; it cannot be used with "
                "images that are noisy already"
            )
    if task.config.only_noisy and "noise_level" in task.loss.inputs and not task.resolved.noise_level[1]:
        raise UsageError(
            f"{source} needs the level of the noise in the pictures, which is 0 by --noise-level or its estimate; add "
            "--noise-level, such as 25/255"
        )
    if not task.data.train.has_clean and any(term.sees_clean for term in task.loss.terms):
        raise UsageError(
            f"{source} needs clean images; with noisy ones alone, use noise2void or neighbor2neighbor, or, if the "
            "level of the noise is known, sure or recorrupted"
        )
    if composite.has_updates(task.config.loss) and task.replicas.shards > 1:
        raise UsageError(f"{source} has a method `update`, which needs whole batches; train one process, --shards 1")
    if task.is_mostly_warmup:
        steps = f"{min(task.config.bce_steps, task.total_steps)} of {task.total_steps} steps"
        warn(f"--bce-steps: BCE is part of the loss in {steps}; lower it, or train longer")


def check_recorded(config: RunConfig, resolved: Resolved, recorded: Resolved) -> None:
    """Raise UsageError unless a run reads the images and the initial weights that an earlier run has `recorded`.

    An empty digest is not compared. The environment variables that change numbers must be the same too.
    """
    if resolved.variables != recorded.variables:
        raise UsageError(
            f"environment: the run was made with {recorded.variables or 'no variable that changes numbers'}, now "
            f"{resolved.variables or 'there is none'}; set the same variables (docs/reproducibility.md)"
        )
    for source, what, got, expected in (
        (datasets.source(config), "images", resolved.data_digest, recorded.data_digest),
        (f"--start-from: {config.start_from}", "weights", resolved.weights_digest, recorded.weights_digest),
    ):
        if expected not in ("", got):
            raise UsageError(
                f"{source}: the {what} differ from those the run was made with (expected SHA-256 {expected}, got {got})"
            )


def load_initial_weights(config: RunConfig, model: keras.Model) -> str:
    """Give `model` the weights that `config.start_from` names, and return their SHA-256.

    Raises UsageError if they are those of another network.
    """
    with as_usage_error("--start-from"):
        loaded = load_model(Path(config.start_from or ""))
    if [weight.shape for weight in loaded.weights] != [weight.shape for weight in model.weights]:
        raise UsageError(
            f"--start-from: {config.start_from}: weights of another network than --model "
            f"{plugins.source(config.model)}, or of other images"
        )
    model.set_weights(loaded.get_weights())
    return weights_digest(loaded)
