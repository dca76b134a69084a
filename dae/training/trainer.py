"""The training loop, with evaluation, reports and checkpoints. The train step itself only computes."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae import callables, plugins, runtime
from dae.config import PYTHON_DATA, RunConfig, canonicalize
from dae.data.datasets import Arrays
from dae.data.noise import Noise
from dae.data.pipeline import (
    batch_spec,
    equal_batches,
    evaluation_batches,
    sample_batch,
    shard_sizes,
    training_batches,
)
from dae.errors import Diverged, Interrupted, RunError, UsageError, first_line, shown
from dae.evaluation.evaluate import Evaluate, make_evaluator
from dae.evaluation.metrics import format_metrics
from dae.losses.losses import Loss
from dae.losses.objective import Objective
from dae.models.networks import NetworkFunction
from dae.replicas import ALONE, LOST_WORKER, Replicas, from_environment
from dae.reporting.console import Console, warn
from dae.reporting.logger import Logger, NoLogger
from dae.training import outputs
from dae.training.checkpoints import Checkpoints
from dae.training.profiler import profiled
from dae.training.signals import deferred_signals
from dae.training.stopwatch import Stopwatch
from dae.training.task import Task, prepare
from dae.training.train_state import TrainState
from dae.training.train_step import make_train_loop, make_train_step
from dae.training.workers import check_states, compare_workers, silent
from dae.workdir import workdir
from dae.workdir.workdir import Workdir

# Above the number of any signal.
CALLBACK_FAILED = 1000

OnEpochEnd = Callable[[dict[str, float]], object]

# One call of the train loop takes as many steps as process this many pixel values, those of 20 batches of 128 MNIST
# images. Signals and the progress bar are handled only between calls, so a call takes fewer steps of larger images.
VALUES_PER_LOOP = 20 * 128 * 28 * 28


def train(
    config: RunConfig,
    run_dir: str | Path | None = None,
    *,
    data: Arrays | None = None,
    loss: Loss | None = None,
    noise: Noise | None = None,
    model: NetworkFunction | None = None,
    metrics: Sequence[Loss] = (),
    resume: bool = False,
    quiet: bool = False,
    profile: bool = False,
    devices: Sequence[str] = (),
    on_epoch_end: OnEpochEnd | None = None,
) -> dict[str, float]:
    """Train a model as `config` describes, write the run to the folder `run_dir`, and return its report.json.

    If the variable TF_CONFIG lists several workers, all of them must call this with the same arguments; only the first
    writes and prints (docs/distributed.md).

    Args:
        config: The settings of the run.
        run_dir: The run's folder; by default a new one in runs/.
        data: Images to train on, instead of those of `config.data`: an array [N, H, W] or [N, H, W, C], uint8, uint16,
            or floats in [0, 1]; or several by name, such as x_train and x_test, or noisy and clean (docs/data.md). To
            resume such a run, pass them again.
        loss: A function `(clean, denoised) -> loss [batch]`, or a subclass of keras.Layer, to minimize instead of
            `config.loss` (docs/losses.md). To resume a run with functions, pass them again.
        noise: A function `(clean, level, seed) -> noisy [batch, H, W, C]`, instead of `config.noise` (docs/data.md).
        model: A function `image_shape -> keras.Model` that builds the network, instead of that of `config.model`
            (docs/networks.md).
        metrics: Functions `(clean, denoised) -> value [batch]`, in addition to `config.metrics` (docs/networks.md).
        resume: Resume the run in `run_dir`, or start it if there is none. A finished run is left as it is.
        quiet: Print only warnings.
        profile: Profile a few steps for TensorBoard's profile plugin.
        devices: Names of devices such as gpu:0 or cpu; by default all GPUs, or else the CPU.
        on_epoch_end: A function that is called with each line of metrics.jsonl once its epoch's results and checkpoint
            are on disk; of several workers, only the chief calls it. An exception that it raises ends the call; the run
            can be resumed.

    Raises:
        UsageError: For a user's mistake, before anything is written.
        RunError: If the run fails.
        Interrupted: After SIGINT, SIGTERM or SIGUSR1 to any worker, once the state is saved.
    """
    config, sources = with_functions(config, {"loss": loss, "noise": noise, "model": model}, metrics)
    if data is not None:
        config = dataclasses.replace(config, data=PYTHON_DATA)
    replicas = from_environment(runtime.select_devices(devices))
    console = Console(quiet or not replicas.is_chief)
    with (
        contextlib.nullcontext() if replicas.is_chief else silent(),
        workdir.opened(run_dir, canonicalize(config), resume, lock=replicas.is_chief) as run,
    ):
        if run.is_finished:
            console.print(f"{run.path} is finished ({run.config.epochs} epochs); nothing to do")
            return workdir.read_report(run.path)
        task = prepare(run.config, data, replicas)
        if run.is_longer and "progress" in task.loss.inputs:
            raise UsageError("--epochs: cannot grow, because the loss depends on `progress`, the share of the run")
        average = task.evaluated_model if task.evaluated_model is not task.model else None
        state = TrainState(task.model, task.loss, task.optimizer, average)
        objective = task.objective(state.step)
        checkpoints = Checkpoints(run.path / "checkpoints", state, replicas)
        hint = ""
        try:
            compare_workers(task.config, replicas)
            if replicas.is_chief:
                task = start_or_restore(run, task, state, checkpoints, sources, resume, console)
            checkpoints.share()
            hint = f"; earlier checkpoints are intact: continue with --resume --run-dir {run.path}"
            config = task.config
            console.print(runtime.describe(config, replicas))
            console.print_layers(task.model)
            if objective.starts_as_bce:
                console.print(f"loss: bce, which fades into {plugins.label(config.loss)} until step {config.bce_steps}")
                if config.bce_steps >= (total := task.total_steps):
                    warn(f"--bce-steps: bce is part of the loss in all {total} steps, until {config.bce_steps}")
            evaluated = task.evaluated_objective(state.step)
            evaluate = make_evaluator(task.evaluated_model, evaluated, config.shards or 1, task.metrics, replicas)
            logger: contextlib.AbstractContextManager[Logger | NoLogger] = contextlib.nullcontext(NoLogger())
            if replicas.is_chief:
                step = int(state.step)
                logger = Logger(run.path, config, task.evaluated_model, task.samples, console, step, task.examples)
            with logger as reports:
                train_epochs(task, state, objective, evaluate, checkpoints, reports, replicas, profile, on_epoch_end)
            report = outputs.write(run.path, task, state, evaluate, checkpoints, replicas)
            replicas.maximum(0)  # wait until the chief has written everything
        except (OSError, tf.errors.OpError) as error:
            lost = "another worker has stopped: " if replicas.workers > 1 and isinstance(error, LOST_WORKER) else ""
            raise RunError(f"{lost}{first_line(error)}{hint}") from error
        except Interrupted as stop:
            raise Interrupted(stop.signal_number, f"{stop}; continue with --resume --run-dir {run.path}") from None
    console.print(f"epoch {report['epoch']} on the test images: {format_metrics(report)}")
    console.print(f"results: {run.path}; curves and images: tensorboard --logdir {run.path.parent}")
    return report


def start_or_restore(
    run: Workdir,
    task: Task,
    state: TrainState,
    checkpoints: Checkpoints,
    sources: Mapping[str, str],
    resume: bool,
    console: Console,
) -> Task:
    """Restore the latest checkpoint if there is a run to resume, or else write its first files.

    Returns `task` with the paths of the copies of users' files.
    """
    if run.has_run:
        checkpoints.restore_latest()
        workdir.check_metrics(run.path, int(state.step) // task.steps_per_epoch)
        config = workdir.reopen(run.path, task.config)
        console.print(*task.data.notes, f"resuming {run.path} after step {int(state.step)}")
    else:
        config = workdir.start(run.path, task.config, sources)
        missing = "no run to resume, " if resume else ""
        console.print(*task.data.notes, f"{missing}writing to {run.path}")
    return dataclasses.replace(task, config=config)


def with_functions(
    config: RunConfig, functions: Mapping[str, Callable | None], metrics: Sequence[Callable]
) -> tuple[RunConfig, dict[str, str]]:
    """Return `config` with functions in place of the names in its fields, and their sources by file name.

    Raises UsageError for anything that cannot be called.
    """
    if not isinstance(metrics, list | tuple):
        raise UsageError(f"--metrics: expected a list of functions, got {shown(metrics)}")
    changes: dict[str, Any] = {}
    sources = {}
    given = [(field, function) for field, function in functions.items() if function is not None]
    for field, function in [*given, *(("metrics", metric) for metric in metrics)]:
        if field == "model" and isinstance(function, keras.Model):
            raise UsageError("--model: expected a function of an image's shape that returns a Keras model, got a model")
        if not callable(function):
            raise UsageError(
                f"--{field}: expected a function, got {shown(function)}; names belong in RunConfig({field}=...)"
            )
        text, sources[text] = callables.record(function, field)
        if field != "metrics":
            changes[field] = text
        elif text not in (recorded := changes.get("metrics", config.metrics)):  # of a run that is resumed
            changes["metrics"] = (*recorded, text)
    kept = {text: source for text, source in sources.items() if source}
    names = plugins.unique_names(map(plugins.label, kept))
    return dataclasses.replace(config, **changes), {
        f"{name}.py": source for name, source in zip(names, kept.values(), strict=True)
    }


def train_epochs(
    task: Task,
    state: TrainState,
    objective: Objective,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    logger: Logger | NoLogger,
    replicas: Replicas = ALONE,
    profile: bool = False,
    on_epoch_end: OnEpochEnd | None = None,
) -> None:
    """Train from the current step of `state` to the end of the last epoch.

    At the end of each epoch, its results are written to disk, and its checkpoint last. A resume removes whatever was
    written after the checkpoint that it restores, and writes it again.
    """
    config, images, first_step = task.config, task.data.train, int(state.step)
    first_epoch = first_step // task.steps_per_epoch + 1
    train_step = make_train_step(state, objective, config, mixes_bce=False, replicas=replicas)
    train_loop = make_train_loop(train_step, config.shards or 1, replicas)
    # A separate graph for the first steps: computing bce after them, with a share of 0, would take a tenth longer.
    bce_step = make_train_step(state, objective, config, replicas=replicas)
    bce_loop = make_train_loop(bce_step, config.shards or 1, replicas)
    bce_steps = config.bce_steps if objective.starts_as_bce else 0
    batches = iter(training_batches(images, config, first_step, replicas))
    train_sample = [sample_batch(images, config, "train evaluation")] if replicas.is_chief else []
    validation = evaluation_batches(task.data.validation, config, "validation", replicas)
    steps_per_loop = max(1, VALUES_PER_LOOP // (config.batch_size * math.prod(task.model.input_shape[1:])))
    checkpoint_every = config.checkpoint_every or task.steps_per_epoch
    with (
        deferred_signals() as pending,
        profiled(train_loop, logger.tensorboard_folder, profile and replicas.is_chief) as train_loop,
    ):
        if first_epoch == 1:
            # Not by the logger, because all workers must make the same graphs.
            batch_size, shards = min(config.batch_size, task.examples), config.shards or 1
            own = sum(shard_sizes(batch_size, shards, replicas.shards(shards)))
            spec = batch_spec((own, *task.model.input_shape[1:]))
            logger.write_graph(train_step.get_concrete_function(spec, batch_size).graph)
        stopwatch = Stopwatch(state.seconds)
        for epoch in range(first_epoch, config.epochs + 1):
            if config.patience is not None and epoch > config.patience + int(state.best_epoch):
                logger.print(
                    f"stopped after epoch {epoch - 1}, {config.patience} epochs after the lowest validation loss"
                )
                break
            last_step = epoch * task.steps_per_epoch
            started, images_before = time.monotonic(), int(state.means.images)
            while (step := int(state.step)) < last_step:
                num_steps, batch_size = equal_batches(task.examples, config.batch_size, step)
                num_steps = min(num_steps, steps_per_loop, checkpoint_every - step % checkpoint_every)
                if step < bce_steps:
                    num_steps = min(num_steps, bce_steps - step)
                loop = bce_loop if step < bce_steps else train_loop
                with nonfinite_as_diverged(state, config):
                    mean_loss = loop(batches, tf.constant(num_steps), batch_size)
                logger.progress(epoch, num_steps * batch_size, mean_loss)
                step += num_steps
                if step == last_step:
                    break  # the epoch's end is saved below
                stop = replicas.maximum(*pending[:1] or [0])
                if stop or step % checkpoint_every == 0:
                    stopwatch.update()
                    checkpoints.save()
                if stop:
                    replicas.maximum(0)  # wait until the chief has saved
                    raise Interrupted(stop, f"stopped and saved after step {step}")
            images_per_second = (int(state.means.images) - images_before) / (time.monotonic() - started)

            means = state.means.result()
            # The training loss is the mean over the epoch's images; other metrics are those of the model at its end.
            trained = evaluate(train_sample) | {name: means.pop(name) for name in task.loss.names}
            line = {
                "epoch": epoch,
                "step": last_step,
                **{f"train_{name}": value for name, value in trained.items()},
                **{f"validation_{name}": value for name, value in evaluate(validation).items()},
                **means,
                "learning_rate": float(state.optimizer.learning_rate),
                "images_per_second": images_per_second,
                "seconds": stopwatch.update(),
            }
            logger.write_epoch(line)
            check_states(state, replicas)
            if epoch == first_epoch:
                warn_if_collapsed(task)
            state.start_epoch()
            checkpoints.save_epoch(epoch, line.get("validation_loss"))
            is_failing = False
            try:
                if on_epoch_end is not None and replicas.is_chief:
                    is_failing = True
                    on_epoch_end(line)
                    is_failing = False
            finally:
                stop = replicas.maximum(*pending[:1] or [CALLBACK_FAILED if is_failing else 0])
                if stop == CALLBACK_FAILED and not is_failing:
                    raise RunError(f"on_epoch_end has raised an exception on worker 0 after epoch {epoch}")
                if stop != CALLBACK_FAILED and stop:
                    raise Interrupted(stop, f"stopped and saved after epoch {epoch}")


@contextlib.contextmanager
def nonfinite_as_diverged(state: TrainState, config: RunConfig) -> Iterator[None]:
    """Turn the train step's error about a loss or gradient that is not finite into Diverged, which names the step."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        quantity = next((word for word in ("loss", "gradient") if f"the {word} : Tensor had" in error.message), None)
        if quantity is None:
            raise
        raise Diverged(
            f"the {quantity} of step {int(state.step) + 1} is not finite; earlier checkpoints are intact; start "
            f"another run with a lower --learning-rate than {config.learning_rate}"
        ) from None


def warn_if_collapsed(task: Task) -> None:
    """Warn if the model returns nearly the same image for every input.

    The criterion is that the range of each output value over up to 20 inputs, averaged over values, is below 0.001.
    """
    denoised = task.evaluated_model(task.samples.noisy[:20]).numpy()
    if len(denoised) > 1 and float(np.ptp(denoised, axis=0).mean()) < 0.001:
        warn(
            "the network returns nearly the same image for every input, and may never learn more; try another "
            "--learning-rate, or more --bce-steps"
        )
