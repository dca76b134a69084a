"""The training loop: the train step only computes; the functions here decide, write and print."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

from dae import config as configs
from dae import plugins, runtime
from dae.config import RunConfig
from dae.data import datasets, noise
from dae.data.datasets import Splits
from dae.data.pipeline import Batch, evaluation_batches, first_evaluation_batch, steps_per_epoch, training_batches
from dae.errors import RunError, Stopped, UsageError, first_line
from dae.evaluation import metrics
from dae.losses import contract, losses
from dae.losses.losses import Loss, WeightedSum
from dae.models import networks
from dae.optimizers import optimizers
from dae.reporting.console import Progress, epoch_in_words
from dae.reporting.tensorboard import Summaries
from dae.training import export, profiler, signals
from dae.training.checkpoints import Checkpoints
from dae.training.run import Run
from dae.training.train_step import TrainStep, TrainSteps, make_train_step, make_train_steps, naming_what_is_not_finite
from dae.workdir import workdir

AfterEpoch = Callable[[dict[str, float]], object]

# For so long nobody looks at signals and the progress bar: steps are taken several at a time, as many as that allows.
SECONDS_AT_A_TIME = 0.1


def train(
    config: RunConfig,
    run_dir: str | Path | None = None,
    *,
    loss: Loss | None = None,
    resume: bool = False,
    quiet: bool = False,
    profile: bool = False,
    after_epoch: AfterEpoch | None = None,
) -> dict[str, float]:
    """Trains as `config` says, writing to the folder `run_dir`, by default a new one under runs/.

    A function given as `loss` is minimised in place of `config.loss`, and a resume needs it again. With `resume`, goes
    on with the run in `run_dir` if there is one; a finished one is left as it is. With `quiet`, prints warnings only.
    With `profile`, writes a trace of a few steps to the run's TensorBoard folder. `after_epoch` is called with each
    line of metrics.jsonl, once all of that epoch is on disk. Returns what the run's report.json says. Raises UsageError
    for mistakes, before anything is written; RunError where the run itself fails; Stopped after SIGINT or SIGTERM, once
    the state is saved.
    """
    folder = None if run_dir is None else Path(run_dir)
    sources = {}
    if loss is not None:
        text, source = plugins.given(loss)
        config, sources = dataclasses.replace(config, loss=text), {f"{plugins.label(text)}.py": source}
    config = configs.pinned(config)
    saved = None
    if folder is None and resume:
        raise UsageError("--resume: needs --run-dir, the run to go on with")
    if folder is not None and workdir.has_run(folder):
        if not resume:
            raise UsageError(f"--run-dir: {folder} has a run already; name another, or add --resume to go on with it")
        saved = configs.read(folder / workdir.CONFIG)
        config = configs.resuming(saved, config, folder)
        if config.epochs == saved.epochs and (folder / workdir.REPORT).exists():
            if not quiet:
                print(f"{folder} is finished ({config.epochs} epochs); nothing to do")
            return workdir.read_report(folder)

    config, splits, model, total = prepare(config, loss)
    optimizer = optimizers.build(config, config.epochs * steps_per_epoch(len(splits.train), config.batch_size))
    parts = config.micro_batches or 1

    folder = folder or workdir.new(config)
    with workdir.claimed(folder):
        now = configs.read(folder / workdir.CONFIG) if workdir.has_run(folder) else None
        if now != saved:
            raise UsageError(f"--run-dir: another process has been working on {folder}")
        checkpoints = Checkpoints(folder / "checkpoints", model, optimizer, losses=len(total.names))
        if saved is not None:
            checkpoints.restore_newest()
            config = workdir.reopen(folder, config)
            began = f"going on with {folder} after step {int(checkpoints.state.step)}"
        else:
            config = workdir.start(folder, config, sources)
            began = f"writing to {folder}"
        evaluate = metrics.evaluator(model, total, parts)
        progress = Progress(quiet)
        run = Run(config, folder, splits, model, total, evaluate, checkpoints, progress)
        for said in (*splits.notes, began):
            progress.say(said)
        progress.show_layers(model)
        try:
            train_step = make_train_step(model, optimizer, total, checkpoints.state, parts)
            _train_epochs(run, train_step, profile, after_epoch)
            report = export.write(run)
            progress.say(f"the model of epoch {report['epoch']} on the test images: {metrics.in_words(report)}")
            progress.say(f"everything is in {folder}; look at it with: tensorboard --logdir {folder.parent}")
            return report
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"{first_line(error)}; what was saved before is good: go on with --resume --run-dir {folder}"
            ) from error


def prepare(config: RunConfig, given: Loss | None = None) -> tuple[RunConfig, Splits, keras.Model, WeightedSum]:
    """What a run of `config` is made of, checked, with `config` as it will be recorded; `given` goes before its loss.

    Raises UsageError for what the run would be refused for.
    """
    config = runtime.settle(config)
    splits = datasets.load(config)
    config = dataclasses.replace(config, data_digest=splits.digest, validation_examples=len(splits.validation))
    model = networks.build(config, splits.image_shape)
    loss = losses.load(config.loss) if given is None else losses.given(given, config.loss)
    noise.check(config, splits.image_shape)
    if not {term.function for term in loss.terms} <= set(losses.LOSSES.values()):  # those that ship are tested
        noisy, clean = next(iter(training_batches(splits.train, config).take(1)))
        contract.check(loss, clean, model(noisy))
    return config, splits, model, loss


def _train_epochs(run: Run, train_step: TrainStep, profile: bool, after_epoch: AfterEpoch | None) -> None:
    """Trains from the step that the state is at to the last one; every epoch ends with its results on disk.

    An epoch's checkpoint comes last: a resume drops what was written after the checkpoint it goes on from, and
    writes it again.
    """
    config, state, steps = run.config, run.checkpoints.state, run.steps_per_epoch
    epochs_done, steps_into_epoch = divmod(int(state.step), steps)
    batches = iter(training_batches(run.splits.train, config, int(state.step)))
    untraced = make_train_steps(train_step, config.batch_size)
    tracing = (
        profiler.traced(untraced, run.folder / "tensorboard", run.progress.say)
        if profile
        else contextlib.nullcontext(untraced)
    )
    validation = evaluation_batches(run.splits.validation, config, "validation")
    some_training = [first_evaluation_batch(run.splits.train, config, "train evaluation")]
    workdir.keep_epochs(run.folder, epochs_done)
    images_done = epochs_done * len(run.splits.train) + steps_into_epoch * config.batch_size
    run.progress.start_bar(config.epochs * len(run.splits.train), images_done)
    with (
        signals.collected() as received,
        Summaries(run.folder, config, run.model, run.examples, epochs_done) as summaries,
        run.progress,
        tracing as train_steps,
    ):
        if epochs_done == 0:
            summaries.write_graph(train_step, min(config.batch_size, len(run.splits.train)))
        run.checkpoints.start_clock()
        for epoch in range(epochs_done + 1, config.epochs + 1):
            trained = _train_epoch(run, train_step, train_steps, batches, epoch, received)
            validated = run.evaluate(validation) if config.validation_examples else {}
            started = time.monotonic()
            # The loss of the epoch's batches as they came goes before that of a few images after it.
            trained = {f"train_{name}": value for name, value in run.evaluate(some_training).items()} | trained
            line = {
                "epoch": epoch,
                "step": int(state.step),
                **trained,
                **{f"validation_{name}": value for name, value in validated.items()},
                "learning_rate": float(state.optimizer.learning_rate),
            }
            summaries.write_epoch(line)
            line["summary_seconds"] = time.monotonic() - started
            # From line to line, so that each epoch counts one checkpoint: the one before it.
            line["seconds"] = run.checkpoints.count_seconds()
            workdir.append_metrics(run.folder, line)
            run.progress.say(epoch_in_words(line, config.epochs))
            if epoch == epochs_done + 1 and run.returns_one_image():
                with_bce = any(term.function is losses.bce for term in run.loss.terms)
                run.progress.warn(
                    "the network returns nearly the same image whatever it is given, and may never learn more; "
                    "try another --learning-rate" + ("" if with_bce else ", or bce as a further term of the loss")
                )

            run.checkpoints.end_epoch(epoch, line.get("validation_loss"))
            if after_epoch is not None:
                after_epoch(line)
            if received:
                raise _stopped(run, received[0])


def _train_epoch(
    run: Run,
    train_step: TrainStep,
    train_steps: TrainSteps,
    batches: Iterator[Batch],
    epoch: int,
    received: list[int],
) -> dict[str, float]:
    """Trains to the end of `epoch`; returns the epoch's means, and the speed of this process.

    Raises Stopped where a signal is `received` before the last step, with the state saved. The last step is taken by
    itself: its batch may be smaller, and its update is measured.
    """
    state, last_step, batch_size = run.checkpoints.state, epoch * run.steps_per_epoch, run.config.batch_size
    checkpoint_every = run.config.checkpoint_every or last_step
    in_words = f"{epoch}/{run.config.epochs}"
    started, images_before = time.monotonic(), int(state.images)
    step, at_a_time = int(state.step), 1
    with naming_what_is_not_finite(run):
        while step < last_step - 1:
            began = time.monotonic()
            count = min(at_a_time, last_step - 1 - step, checkpoint_every - step % checkpoint_every)
            mean_loss = train_steps(batches, tf.constant(count))
            within_time = int(count * SECONDS_AT_A_TIME / (time.monotonic() - began))
            at_a_time = max(1, min(within_time, 2 * at_a_time))
            step += count
            run.progress.update(in_words, count * batch_size, mean_loss)
            if received:
                run.checkpoints.save()
                raise _stopped(run, received[0])
            if step % checkpoint_every == 0:
                run.checkpoints.save()
        weights = run.model.trainable_variables
        before = [tf.identity(variable) for variable in weights]
        noisy, clean = next(batches)
        mean_loss = train_step(noisy, clean)
        run.progress.update(in_words, clean.shape[0], mean_loss)
    images_per_second = (int(state.images) - images_before) / (time.monotonic() - started)
    update = [variable - old for variable, old in zip(weights, before, strict=True)]
    means = {
        f"train_{name}": float(loss_sum) / float(state.images)
        for name, loss_sum in zip(run.loss.names, state.loss_sums.numpy(), strict=True)
    }
    return means | {
        "gradient_norm": float(state.gradient_norms) / run.steps_per_epoch,
        "update_to_weight_ratio": float(tf.linalg.global_norm(update) / tf.linalg.global_norm(before)),
        "images_per_second": images_per_second,
    }


def _stopped(run: Run, signal_number: int) -> Stopped:
    """What to raise after a signal, with the state saved."""
    step = int(run.checkpoints.state.step)
    return Stopped(signal_number, f"stopped after step {step}, saved; go on with --resume --run-dir {run.folder}")
