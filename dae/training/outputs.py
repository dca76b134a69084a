"""Final artifacts of a run: model files, plots, and last the report, which marks it as finished."""

from typing import Any

from dae import plugins
from dae.evaluation.evaluate import Evaluate, make_evaluator
from dae.evaluation.metrics import format_metrics, psnr_of_mse
from dae.models import networks
from dae.models.fused_layers import fused
from dae.reporting import plots, tensorboard
from dae.reporting.logger import Console
from dae.training.checkpoints import Checkpoints
from dae.training.task import Task
from dae.training.train_state import TrainState
from dae.workdir import model_files, workdir
from dae.workdir.workdir import Workdir


def write(
    run: Workdir,
    task: Task,
    state: TrainState,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    console: Console,
    epochs: int,
) -> dict[str, Any]:
    """Write everything to the folder of `run`, and return the report; of several workers, only the chief writes.

    `epochs` is the number of epochs that the report is of.

    The model is that of the epoch with the lowest validation loss (without clean images, `blind_spot_error`), or of the
    last epoch if nothing validates.
    """
    if len(task.data.validation):
        checkpoints.restore_best()
    low, high = task.resolved.noise_level
    level, name = low if low == high else [low, high], plugins.label(task.config.noise)
    noise = {"model": name, "level": level, "clipped": task.config.clip_noise}
    report: dict[str, Any] = {
        "epochs": epochs,
        "epoch": int(state.step) // task.steps_per_epoch,
        "noise": noise if high and task.data.train.has_clean else None,
        "num_test_images": len(task.data.test),
        "parameters": task.evaluated_model.count_params(),
        "weights_sha256": model_files.weights_digest(task.evaluated_model),
        **evaluate("test", task.batches("test")),
    }
    if task.data.test.has_clean and not task.data.train.has_clean:
        report |= make_evaluator(task.evaluated_model, replicas=task.replicas)("test", task.batches("test"))
    if "test_mse" in report:
        report["test_psnr_of_mean_mse"] = psnr_of_mse(report["test_mse"])
    if task.replicas.is_chief:
        _write_files(run, task, report, console)
    task.replicas.exchange(b"")  # wait until the chief has written everything
    return report


def _write_files(run: Workdir, task: Task, report: dict[str, Any], console: Console) -> None:
    run.check()
    folder = run.output
    (folder / workdir.REPORT).unlink(missing_ok=True)  # of fewer epochs
    is_own = task.config.model not in networks.MODELS
    console.print(*model_files.save_all(task.evaluated_model, folder, task.resolved.value_range, is_own))
    denoise = fused(task.evaluated_model, training=False)
    plots.save_denoised(folder / "denoised.png", task.data.test, task.config, lambda noisy: denoise(noisy).images)
    curves = tensorboard.curves(workdir.read_metrics(folder))
    plots.save_curves(folder / "curves.png", curves, report["epoch"])
    tensorboard.write_test(folder / "tensorboard", report)
    workdir.write_report(folder, report)
    console.print(f"epoch {report['epoch']} on the test images: {format_metrics(report)}")
    console.print(f"results: {run.path}; curves and images: tensorboard --logdir {run.path.parent}")
