"""Networks and optimizers in the forms in which people bring them: train, are killed, resume, reload and denoise."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from runs import config_of
from test_exact_resume import as_if_killed, assert_same

import dae
from dae.data.pipeline import evaluation_batches
from dae.errors import RunError, UsageError
from dae.inference import export
from dae.models import networks
from dae.models.fused_layers import outputs
from dae.training import trainer
from dae.training.checkpoints import restored_model
from dae.training.task import prepare
from dae.workdir.model_files import MODEL_FILES, WEIGHTS, load_model
from dae.workdir.workdir import read_report

FIXED_SIZE = "the model takes images of (16, 16, 1), not of 20 x 24"

# A row of runs.py, the model files from which Keras alone restores the network, and the error for other sizes.
NETWORKS = [
    ("published_dncnn", [], None),
    ("published_nafnet", ["model.keras"], None),
    ("published_attention", [], None),
    ("published_spectral", [], None),
    ("published_variational", [], FIXED_SIZE),
    ("published_times", [], None),
]
FAST = "published_dncnn"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alone", "problem"), [pytest.param(*row, id=row[0]) for row in NETWORKS])
def test_a_published_network_trains_resumes_exactly_reloads_denoises_and_is_exported(
    name, alone, problem, finished_run, files, tmp_path, capsys
):
    run, expected = tmp_path / "run", finished_run(name)
    as_if_killed(expected, run, 12)
    np.testing.assert_equal(restored_model(run).count_params(), load_model(expected).count_params())
    trainer.train(config_of(files, name), run, resume=True)
    assert_same(run, expected)
    missing = [file for file in MODEL_FILES if file not in alone]
    assert f"model files: without {', '.join(missing)}, from which" in capsys.readouterr().out
    assert sorted(file.name for file in run.glob("model.*")) == sorted([*alone, WEIGHTS])
    for name_of_file in alone:
        assert keras.models.load_model(run / name_of_file, compile=False)

    model, image = load_model(run), np.random.default_rng(0).random((16, 16), np.float32)
    expected_image = np.clip(outputs(model, image[None, ..., None]), 0, 1)[0, ..., 0]
    np.testing.assert_allclose(dae.denoise(image, model), expected_image, atol=1e-6)
    np.testing.assert_array_equal(dae.denoise(image, model), dae.denoise(image, run))
    other = np.random.default_rng(1).random((20, 24), np.float32)
    if problem is None:
        assert dae.denoise(other, model).shape == other.shape
    else:
        with pytest.raises(UsageError) as caught:
            dae.denoise(other, model)
        assert str(caught.value) == problem
    if name == "published_variational":  # what it draws in inference is not part of a file
        with pytest.raises(RunError, match=r"^savedmodel: images \(1, 16, 16, 1\) differ by up to "):
            export.export(model, "savedmodel", tmp_path / "exported")
    else:
        assert export.export(model, "savedmodel", tmp_path / "exported")


@pytest.mark.parametrize("added", [b"", b"\nraise SystemExit\n"])
def test_a_run_builds_its_network_from_its_own_copy_of_the_file_once_the_digest_is_compared(
    added, finished_run, tmp_path
):
    run, copy = finished_run(FAST), tmp_path / "run"
    (copy / "code").mkdir(parents=True)
    for name in ("config.json", "resolved.json", "report.json", "model.weights.h5", "code/published.py"):
        (copy / name).write_bytes((run / name).read_bytes() + (added if name.startswith("code") else b""))
    if added:
        with pytest.raises(UsageError, match=r"published.py: differs from what the run was made with"):
            load_model(copy)
    else:
        assert all(map(np.array_equal, load_model(copy).get_weights(), load_model(run).get_weights()))


def test_names_that_two_files_register_with_keras_do_not_collide(files, tmp_path):
    """The class that each of the files registers as `Gain` is that of its own network."""
    other = tmp_path / "other.py"
    text = (files / "published.py").read_text()
    other.write_text(text.replace("class Gain(Scale):\n    pass", "class Gain(layers.ReLU):\n    pass"))
    counts = [
        networks.build(config_of(files, model=f"{file}:attention"), (16, 16, 1)).count_params()
        for file in (files / "published.py", other, files / "published.py")
    ]
    assert counts[0] == counts[2] == counts[1] + 4
    assert "Gain" not in "".join(keras.saving.get_custom_objects())


def test_loss_of_a_linear_network_sees_the_outputs_and_metrics_the_clipped_images(finished_run, files):
    run = finished_run(FAST)
    config = config_of(files, FAST)
    task, model = prepare(config), load_model(run)
    squared, clipped = [], []
    for batch in evaluation_batches(task.data.test, config, "test"):
        denoised = outputs(model, batch.noisy)
        squared.append(np.square(denoised - batch.clean).mean(axis=(1, 2, 3)))
        clipped.append(np.square(np.clip(denoised, 0, 1) - batch.clean).mean(axis=(1, 2, 3)))
    report = read_report(run)
    assert report["test_loss"] == pytest.approx(np.concatenate(squared).mean(), rel=1e-5)
    assert report["test_mse"] == pytest.approx(np.concatenate(clipped).mean(), rel=1e-5)
    assert report["test_mse"] < report["test_loss"]
    assert not task.objective(tf.Variable(0, dtype=tf.int64)).warms_up
