"""What a finished run leaves: model files, plots, latents, and last the report, which marks it as finished."""

from pathlib import Path

from dae.data import datasets
from dae.evaluation.evaluate import Evaluate, denoise_samples, evaluate_test
from dae.models import networks, sizes
from dae.replicas import Replicas
from dae.reporting import plots, projector, tensorboard
from dae.training.checkpoints import Checkpoints
from dae.training.task import Task
from dae.training.train_state import TrainState
from dae.workdir import model_files, workdir


def write(
    folder: Path, task: Task, state: TrainState, evaluate: Evaluate, checkpoints: Checkpoints, replicas: Replicas
) -> dict[str, float]:
    """Write everything and return the report; of several workers, only the chief writes.

    The model is that of the epoch with the lowest validation loss, or of the last epoch if nothing validates.
    """
    if len(task.data.validation):
        checkpoints.restore_best()
    report = {
        "epoch": int(state.step) // task.steps_per_epoch,
        "parameters": task.evaluated_model.count_params(),
        **evaluate_test(evaluate, task.config, task.data.test, replicas),
    }
    if not replicas.is_chief:
        return report
    for name in model_files.MODEL_FILES:
        model_files.save_model(sizes.any_size(task.evaluated_model), folder / name)
    plots.save_denoised(folder / "denoised.png", denoise_samples(task.evaluated_model, task.config, task.data.test))
    curves = tensorboard.curves(workdir.read_metrics(folder))
    plots.save_curves(folder / "curves.png", curves, report["epoch"])
    tensorboard.write_test(folder / "tensorboard", report)
    _write_latents(folder / "tensorboard", task)
    workdir.write_report(folder, report)
    return report


def _write_latents(folder: Path, task: Task) -> None:
    """Write the latents of the samples, with their labels if these are known."""
    encoder = networks.encoder(task.evaluated_model)
    if encoder is None:
        return
    noisy, clean = task.samples.noisy, task.samples.clean
    labels = datasets.training_labels(task.config)
    if labels is not None and len(task.data.validation):
        labels = labels[-len(task.data.validation) :]
    projector.write_latents(
        folder, encoder(noisy).numpy(), clean.numpy(), None if labels is None else labels[: len(clean)]
    )
