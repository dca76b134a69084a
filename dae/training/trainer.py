"""The training loop, with evaluation, reports and checkpoints. The train step itself only computes."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dae import runtime
from dae.config import PYTHON_DATA, RunConfig
from dae.data.datasets import Arrays
from dae.data.pipeline import batch_spec, training_batches
from dae.errors import RunError, UsageError, first_line
from dae.evaluation.evaluate import Evaluate, make_evaluator
from dae.machine import check_tensorflow, keras_defaults
from dae.replicas import LOST_WORKER, from_environment
from dae.reporting.logger import Console, Logger
from dae.resolved import Resolved
from dae.training import outputs
from dae.training.calls import loop_calls
from dae.training.checkpoints import Checkpoints
from dae.training.interruption import Interruption
from dae.training.task import Task, prepare
from dae.training.train_state import Stopwatch, TrainState
from dae.training.train_step import TrainLoop, make_train_loop, make_train_step
from dae.training.workers import check_settings
from dae.workdir import workdir
from dae.workdir.workdir import Workdir


class EpochEnd(NamedTuple):
    """The results of an epoch, as `on_epoch_end` receives them."""

    values: dict[str, float]
    """The line of metrics.jsonl."""
    model: keras.Model
    """The network as it was evaluated; with `ema_decay`, that of the averaged weights."""
    step: int
    """Training steps done."""


OnEpochEnd = Callable[[EpochEnd], object]


@keras_defaults()
def train(
    config: RunConfig,
    run_dir: str | Path | None = None,
    *,
    data: Arrays | None = None,
    recorded: Resolved | None = None,
    resume: bool = False,
    finish: bool = False,
    quiet: bool = False,
    devices: Sequence[str] = (),
    on_epoch_end: OnEpochEnd = lambda epoch_end: None,
) -> dict[str, Any]:
    """Train a model as `config` describes, write the run to the folder `run_dir`, and return its report.json.

    If the variable TF_CONFIG lists several workers, all of them must call this with the same arguments; only the first
    writes and prints (docs/distributed.md).

    Args:
        config: The settings of the run.
        run_dir: The run's folder; by default a new one in runs/.
        data: Images to train on, instead of those of `config.data`: an array [N, H, W] or [N, H, W, C], uint8, uint16,
            or floats in [0, 1]; or several by name, such as x_train and x_test, or noisy and clean (docs/data.md). To
            resume such a run, pass them again.
        recorded: The resolved.json of an earlier run that is repeated, with its number of shards and threads.
        resume: Resume the run in `run_dir`, or start it if there is none. A finished run is left as it is.
        finish: Train the resumed run no further, but evaluate its complete epochs and write the model and the report.
            A later call without it trains on.
        quiet: Print only warnings.
        devices: Names of devices such as gpu:0 or cpu; by default all GPUs, or else the CPU.
        on_epoch_end: A function that is called with an `EpochEnd` (`values`, `model`, `step`) once the epoch's results
            and checkpoint are on disk; of several workers, only the chief calls it. An exception that it raises ends
            the call; the run can be resumed (docs/logging.md).

    Raises:
        UsageError: For a user's mistake, before anything is written.
        RunError: If the run fails.
        Interrupted: After SIGINT, SIGTERM, SIGUSR1 or SIGHUP to any worker, once the state is saved; it is a
            KeyboardInterrupt.
    """
    if not isinstance(config, RunConfig):
        raise UsageError(f"config: expected dae.RunConfig(...) or dae.preset(...), got a {type(config).__name__}")
    check_tensorflow()
    if data is not None:
        config = dataclasses.replace(config, data=PYTHON_DATA)
    replicas = from_environment(runtime.select_devices(devices))
    console = Console(quiet or not replicas.is_chief)
    with (
        contextlib.nullcontext() if replicas.is_chief else contextlib.redirect_stderr(io.StringIO()),
        workdir.opened(run_dir, config, resume, replicas.is_chief) as run,
    ):
        if run.report is not None:
            console.print(f"{run.path} is finished; nothing to do")
            return run.report
        if finish and run.recorded is None:
            raise UsageError(f"--finish: {run.path} holds no run; give that of one, with --resume")
        if resume and run.recorded is None:
            console.print(f"no run to resume in {run.path}, starting one")
        task = prepare(run.config, data, replicas, run.recorded or recorded)
        if run.is_longer and "progress" in task.loss.inputs:
            raise UsageError("--epochs: cannot grow, because the loss depends on `progress`, the fraction of the run")
        try:
            check_settings(task.config, task.resolved, task.replicas)
            callback = on_epoch_end if replicas.is_chief else lambda epoch_end: None
            return train_task(task, run, console, callback, finish)
        except (OSError, tf.errors.OpError) as error:
            lost = "another worker has stopped: " if replicas.workers > 1 and isinstance(error, LOST_WORKER) else ""
            raise RunError(f"{lost}{first_line(error)}", run.path) from error


def train_task(task: Task, run: Workdir, console: Console, on_epoch_end: OnEpochEnd, finish: bool) -> dict[str, Any]:
    """Start or restore the run of `task`, train it unless it is to `finish`, write its results; return its report."""
    state, config = task.new_state(), task.config
    checkpoints = Checkpoints(run.output / "checkpoints", state, task.replicas, task.steps_per_epoch, run.check)
    if run.recorded is not None and task.replicas.is_chief:
        checkpoints.restore_latest(whole_epochs=finish)
        workdir.reopen(run.path, config, int(state.step) // task.steps_per_epoch)
        console.print(*task.data.notes, f"resuming {run.path} after step {int(state.step)}")
    else:
        workdir.start(run.output, config, task.resolved)
        console.print(*task.data.notes, f"writing to {run.path}")
    checkpoints.share()
    objective = task.objective(state.step)
    console.print(runtime.describe(task.resolved, task.replicas), f"loss: {objective.describe()}")
    if not console.quiet:
        task.model.summary()
    evaluate = make_evaluator(task.evaluated_model, task.evaluated_objective(state.step), task.metrics, task.replicas)
    train_step = make_train_step(state, objective, task.network, task.replicas)
    train_loop = make_train_loop(train_step, state)
    step = int(state.step)
    with (
        Logger(run, config, task.resolved, task.evaluated_model, task.samples, console, step, task.examples) as logger,
        Interruption(task.replicas, run.path) as interruption,
    ):
        if step < task.steps_per_epoch:
            spec = batch_spec((min(config.batch_size, task.examples), *task.model.input_shape[1:]))
            logger.tensorboard.write_graph(train_step.get_concrete_function(spec).graph)
        if not finish:
            train_epochs(task, state, train_loop, evaluate, checkpoints, logger, interruption, on_epoch_end)
    epochs = int(state.step) // task.steps_per_epoch if finish else config.epochs
    return outputs.write(run, task, state, evaluate, checkpoints, console, epochs)


def train_epochs(
    task: Task,
    state: TrainState,
    train_loop: TrainLoop,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    logger: Logger,
    interruption: Interruption,
    on_epoch_end: OnEpochEnd,
) -> None:
    """Train from the current step of `state` to the end of the last epoch.

    At the end of each epoch, its results are written to disk, and its checkpoint last. A resume removes whatever was
    written after the checkpoint that it restores, and writes it again.
    """
    config, first_step = task.config, int(state.step)
    batches = iter(training_batches(task.data.train, config, first_step))
    for epoch in range(first_step // task.steps_per_epoch + 1, config.epochs + 1):
        if state.stops_early(epoch, config.patience):
            logger.print(f"stopped after epoch {epoch - 1}, {config.patience} epochs after the best one")
            break
        stopwatch = Stopwatch(state)
        for num_steps, batch_size, is_last in loop_calls(task, int(state.step)):
            mean_loss = train_loop(batches, num_steps, batch_size)
            stopwatch.update()
            logger.progress(epoch, num_steps * batch_size, mean_loss)
            if not is_last:  # the end of the epoch is saved below, once its results are written
                if int(state.step) % task.checkpoint_every == 0:
                    checkpoints.save()
                interruption.raise_if_pending(f"step {int(state.step)}", save=checkpoints.save)
        results = {
            "epoch": epoch,
            "step": int(state.step),
            **evaluate("train", task.train_sample),
            **state.epoch_means(),  # with the training loss, a mean over the images of the epoch
            **evaluate("validation", task.batches("validation")),
            "learning_rate": float(state.optimizer.learning_rate),
            "images_per_second": stopwatch.images_per_second(),  # without the evaluation
            "seconds": stopwatch.update(),
        }
        logger.write_epoch(results)
        state.start_epoch()
        checkpoints.save_epoch(epoch, results.get(task.criterion))
        on_epoch_end(EpochEnd(results, task.evaluated_model, int(state.step)))
        interruption.raise_if_pending(f"epoch {epoch}")
