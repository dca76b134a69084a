"""Final artifacts of a run: model files, plots, and last the report, which marks it as finished."""

from pathlib import Path

from dae.evaluation.evaluate import Evaluate, denoise_samples
from dae.evaluation.metrics import psnr_of_mse
from dae.models import sizes
from dae.reporting import plots, tensorboard
from dae.training.checkpoints import Checkpoints
from dae.training.task import Task
from dae.training.train_state import TrainState
from dae.workdir import model_files, workdir


def write(
    folder: Path, task: Task, state: TrainState, evaluate: Evaluate, checkpoints: Checkpoints
) -> dict[str, float]:
    """Write everything to `folder`, and return the report; of several workers, only the chief writes.

    The model is that of the epoch with the lowest validation loss, or of the last epoch if nothing validates.
    """
    if len(task.data.validation):
        checkpoints.restore_best()
    report = {
        "epoch": int(state.step) // task.steps_per_epoch,
        "parameters": task.evaluated_model.count_params(),
        **evaluate("test", task.batches("test")),
    }
    report["test_psnr_of_mean_mse"] = psnr_of_mse(report["test_mse"])
    if not task.replicas.is_chief:
        return report
    for name in model_files.MODEL_FILES:
        model_files.save_model(sizes.any_size(task.evaluated_model), folder / name)
    plots.save_denoised(folder / "denoised.png", denoise_samples(task.evaluated_model, task.config, task.data.test))
    curves = tensorboard.curves(workdir.read_metrics(folder))
    plots.save_curves(folder / "curves.png", curves, report["epoch"])
    tensorboard.write_test(folder / "tensorboard", report)
    workdir.write_report(folder, report)
    return report
