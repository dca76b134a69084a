"""What a finished run leaves: the model, pictures, codes, and last, as the sign that it is finished, the report."""

from dae.data import datasets
from dae.models import networks
from dae.reporting import plots, projector, tensorboard
from dae.training.run import Run
from dae.workdir import model_files, workdir


def write(run: Run) -> dict[str, float]:
    """Writes all of it and returns the report.

    The model is that of the epoch with the least validation loss; where none validates, of the last epoch.
    """
    if run.config.validation_examples:
        run.checkpoints.restore_best()
    for name in model_files.MODEL_FILES:
        model_files.save_model(run.model, run.folder / name)
    report = {
        "epoch": int(run.checkpoints.state.step) // run.steps_per_epoch,
        "parameters": run.model.count_params(),
        **model_files.test(run.model, run.evaluate, run.config, run.splits.test, run.folder / "denoised.png"),
    }
    curves = tensorboard.curves(workdir.read_metrics(run.folder))
    plots.save_curves(run.folder / "curves.png", curves, report["epoch"])
    tensorboard.write_test(run.folder / "tensorboard", report)
    _write_codes(run)
    workdir.write_report(run.folder, report)
    return report


def _write_codes(run: Run) -> None:
    """The codes of the examples, with their labels if these are known."""
    encoder = networks.encoder(run.model)
    if encoder is None:
        return
    noisy, clean = run.examples
    labels = datasets.training_labels(run.config)
    if labels is not None:
        # Those that validate come last.
        labels = labels[-len(run.splits.validation) :][: len(clean)]
    projector.write_codes(run.folder / "tensorboard", encoder(noisy).numpy(), clean.numpy(), labels)
