"""The training loop: the train step only computes; the functions here decide, write and print."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import keras
import tensorflow as tf
from tqdm import tqdm

from dae import config as configs
from dae import (
    datasets,
    denoiser,
    loss_contract,
    losses,
    machine,
    metrics,
    models,
    noise,
    optimizers,
    profiling,
    run_directory,
    signals,
    user_code,
)
from dae.checkpoints import Checkpoints
from dae.config import RunConfig
from dae.datasets import Splits
from dae.errors import RunError, Stopped, UsageError
from dae.losses import Loss, WeightedSum
from dae.pipeline import evaluation_batches, steps_per_epoch, training_batches
from dae.summaries import Summaries, write_test
from dae.train_step import TrainStep, make_train_step

SHOWN_IN_TENSORBOARD = 8

AfterEpoch = Callable[[dict[str, float]], object]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the parts of the loop share."""

    config: RunConfig
    folder: Path
    splits: Splits
    model: keras.Model
    loss: WeightedSum
    evaluate: metrics.Evaluate
    checkpoints: Checkpoints
    quiet: bool

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if not self.quiet:
            tqdm.write(line)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.splits.train), self.config.batch_size)


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
        text, source = user_code.given(loss)
        config, sources = dataclasses.replace(config, loss=text), {f"{user_code.label(text)}.py": source}
    config = configs.pinned(config)
    goes_on = False
    if folder is not None:
        goes_on = run_directory.has_run(folder)
        if goes_on and not resume:
            raise UsageError(f"--run-dir: {folder} has a run already; name another, or add --resume to go on with it")
    elif resume:
        raise UsageError("--resume: needs --run-dir, the run to go on with")
    if folder is not None and goes_on:
        saved = configs.read(folder / run_directory.CONFIG)
        config = configs.resuming(saved, config, folder)
        if config.epochs == saved.epochs and (folder / run_directory.REPORT).exists():
            if not quiet:
                print(f"{folder} is finished ({config.epochs} epochs); nothing to do")
            return run_directory.read_report(folder)

    config, splits, model, total = prepare(config, loss)
    optimizer = optimizers.build(config, config.epochs * steps_per_epoch(len(splits.train), config.batch_size))
    parts = config.micro_batches or 1

    folder = folder or run_directory.new(config)
    with run_directory.claimed(folder):
        if run_directory.has_run(folder) != goes_on:
            raise UsageError(f"--run-dir: another process has been working on {folder}")
        checkpoints = Checkpoints(folder / "checkpoints", model, optimizer, losses=len(total.names))
        if goes_on:
            checkpoints.restore_newest()
            config = run_directory.reopen(folder, config)
            began = f"going on with {folder} after step {int(checkpoints.state.step)}"
        else:
            config = run_directory.start(folder, config, sources)
            began = f"writing to {folder}"
        evaluate = metrics.evaluator(model, total, parts)
        run = _Run(config, folder, splits, model, total, evaluate, checkpoints, quiet)
        for said in (*splits.notes, began):
            run.say(said)
        if not quiet:
            model.summary()
        try:
            train_step = make_train_step(model, optimizer, total, checkpoints.state, parts)
            _train_epochs(run, train_step, profile, after_epoch)
            return _finish(run)
        except (OSError, tf.errors.OpError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"{reason}; what was saved before is good: go on with --resume --run-dir {folder}"
            ) from error


def prepare(config: RunConfig, given: Loss | None = None) -> tuple[RunConfig, Splits, keras.Model, WeightedSum]:
    """What a run of `config` is made of, checked, with `config` as it will be recorded; `given` goes before its loss.

    Raises UsageError for what the run would be refused for.
    """
    config = machine.settle(config)
    splits = datasets.load(config)
    config = dataclasses.replace(config, data_digest=splits.digest, validation_examples=len(splits.validation))
    model = models.build(config, splits.image_shape)
    loss = losses.load(config.loss) if given is None else losses.given(given, config.loss)
    noise.check(config, splits.image_shape)
    if not {term.function for term in loss.terms} <= set(losses.LOSSES.values()):  # those that ship are tested
        noisy, clean = next(iter(training_batches(splits.train, config).take(1)))
        loss_contract.check(loss, clean, model(noisy))
    return config, splits, model, loss


def _train_epochs(run: _Run, train_step: TrainStep, profile: bool, after_epoch: AfterEpoch | None) -> None:
    """Trains from the step that the state is at to the last one; every epoch ends with its results on disk.

    An epoch's checkpoint comes last: a resume drops what was written after the checkpoint it goes on from, and
    writes it again.
    """
    config, state, steps = run.config, run.checkpoints.state, run.steps_per_epoch
    epochs_done, steps_into_epoch = divmod(int(state.step), steps)
    checkpoint_every = config.checkpoint_every or steps
    batches: Iterable = training_batches(run.splits.train, config, int(state.step))
    batches = iter(profiling.traced(batches, run.folder / "tensorboard") if profile else batches)
    validation = evaluation_batches(run.splits.validation, config, "validation")
    noisy_shown, clean_shown = _examples(run)
    run_directory.keep_epochs(run.folder, epochs_done)
    bar = tqdm(
        total=config.epochs * len(run.splits.train),
        initial=epochs_done * len(run.splits.train) + steps_into_epoch * config.batch_size,
        unit=" images",
        unit_scale=True,
        disable=run.quiet or None,  # None: shown on a terminal only
    )
    with signals.collected() as received, Summaries(run.folder / "tensorboard", config, epochs_done) as summaries, bar:
        run.checkpoints.start_clock()
        for epoch in range(epochs_done + 1, config.epochs + 1):
            bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
            started, images_before, first_step = time.monotonic(), int(state.images), int(state.step)
            with _naming_what_is_not_finite(run):
                for step, (noisy, clean) in zip(range(first_step + 1, epoch * steps + 1), batches, strict=False):
                    mean_loss = train_step(noisy, clean)
                    # tqdm redraws itself a few times a second, and only then is the loss fetched.
                    if bar.update(clean.shape[0]):
                        bar.set_postfix_str(f"loss {float(mean_loss):.4f}", refresh=False)
                    if received and step < epoch * steps:
                        run.checkpoints.save()
                        raise _stopped(run, received[0])
                    if step % checkpoint_every == 0 and step < epoch * steps:
                        run.checkpoints.save()
            images_per_second = (int(state.images) - images_before) / (time.monotonic() - started)

            line: dict[str, float] = {"epoch": epoch, "step": int(state.step)}
            for name, loss_sum in zip(run.loss.names, state.loss_sums.numpy(), strict=True):
                line[f"train_{name}"] = float(loss_sum) / float(state.images)
            if config.validation_examples:
                line |= {f"validation_{name}": value for name, value in run.evaluate(validation).items()}
            line["learning_rate"] = float(state.optimizer.learning_rate)
            line["images_per_second"] = images_per_second
            summaries.write_epoch(line, noisy_shown, run.model(noisy_shown), clean_shown)
            # From line to line, so that each epoch counts one checkpoint: the one before it.
            line["seconds"] = run.checkpoints.count_seconds()
            run_directory.append_metrics(run.folder, line)
            run.say(_in_words(line, config.epochs))

            run.checkpoints.end_epoch(epoch, line.get("validation_loss"))
            if after_epoch is not None:
                after_epoch(line)
            if received:
                raise _stopped(run, received[0])


def _finish(run: _Run) -> dict[str, float]:
    """Writes the model, the picture and last, as the sign that the run is finished, the report; returns that.

    The model is that of the epoch with the least validation loss; where none validates, of the last epoch.
    """
    if run.config.validation_examples:
        run.checkpoints.restore_best()
    for name in denoiser.MODEL_FILES:
        denoiser.save_model(run.model, run.folder / name)
    report = {
        "epoch": int(run.checkpoints.state.step) // run.steps_per_epoch,
        "parameters": run.model.count_params(),
        **denoiser.test(run.model, run.config, run.splits.test, run.folder / "denoised.png", run.loss),
    }
    write_test(run.folder / "tensorboard", report)
    run_directory.write_report(run.folder, report)
    run.say(f"the model of epoch {report['epoch']} on the test images: {metrics.in_words(report)}")
    run.say(f"everything is in {run.folder}; look at it with: tensorboard --logdir {run.folder.parent}")
    return report


def _examples(run: _Run) -> tuple[tf.Tensor, tf.Tensor]:
    """The first few (noisy, clean) validation images, or training images where none validates."""
    images = run.splits.validation if run.config.validation_examples else run.splits.train
    noisy, clean = next(iter(evaluation_batches(images, run.config, "validation")))
    return noisy[:SHOWN_IN_TENSORBOARD], clean[:SHOWN_IN_TENSORBOARD]


def _in_words(line: dict[str, float], epochs: int) -> str:
    """One line of metrics.jsonl for a reader."""
    words = f"epoch {line['epoch']}/{epochs}: train loss {line['train_loss']:.4f}"
    if "validation_loss" in line:
        words += f", validation loss {line['validation_loss']:.4f}"
        words += f", PSNR {line['validation_psnr']:.2f} dB, SSIM {line['validation_ssim']:.3f}"
    return words + f" ({line['images_per_second']:,.0f} images/s, {line['seconds']:.1f} s)"


def _stopped(run: _Run, signal_number: int) -> Stopped:
    """What to raise after a signal, with the state saved."""
    step = int(run.checkpoints.state.step)
    return Stopped(signal_number, f"stopped after step {step}, saved; go on with --resume --run-dir {run.folder}")


@contextlib.contextmanager
def _naming_what_is_not_finite(run: _Run) -> Iterator[None]:
    """Turns the train step's refusal of a number that is not finite into a RunError that says where."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        culprit = next((word for word in ("loss", "gradient") if f"the {word} : Tensor had" in error.message), None)
        if culprit is None:
            raise
        raise RunError(
            f"the {culprit} of step {int(run.checkpoints.state.step) + 1} is not finite; "
            f"what was saved before it in {run.folder} is good; another run may need a lower --learning-rate than "
            f"{run.config.learning_rate}"
        ) from None
