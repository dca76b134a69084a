"""What a finished run leaves: the model, pictures, codes, and last, as the sign that it is finished, the report."""

from dae import datasets, denoiser, figures, models, projector, run_directory, summaries
from dae.run import Run


def write(run: Run) -> dict[str, float]:
    """Writes all of it and returns the report.

    The model is that of the epoch with the least validation loss; where none validates, of the last epoch.
    """
    if run.config.validation_examples:
        run.checkpoints.restore_best()
    for name in denoiser.MODEL_FILES:
        denoiser.save_model(run.model, run.folder / name)
    report = {
        "epoch": int(run.checkpoints.state.step) // run.steps_per_epoch,
        "parameters": run.model.count_params(),
        **denoiser.test(run.model, run.evaluate, run.config, run.splits.test, run.folder / "denoised.png"),
    }
    curves = summaries.curves(run_directory.read_metrics(run.folder))
    figures.save_curves(run.folder / "curves.png", curves, report["epoch"])
    summaries.write_test(run.folder / "tensorboard", report)
    _write_codes(run)
    run_directory.write_report(run.folder, report)
    return report


def _write_codes(run: Run) -> None:
    """The codes of the examples, with their labels if these are known."""
    encoder = models.encoder(run.model)
    if encoder is None:
        return
    noisy, clean = run.examples
    labels = datasets.training_labels(run.config)
    if labels is not None:
        # Those that validate come last.
        labels = labels[-len(run.splits.validation) :][: len(clean)]
    projector.write_codes(run.folder / "tensorboard", encoder(noisy).numpy(), clean.numpy(), labels)
