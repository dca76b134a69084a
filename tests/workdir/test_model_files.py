import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from helpers import EIGHT_BITS, fuzz, rejected, run_in_process
from hypothesis import given
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import check_fits, make_evaluator
from dae.workdir import workdir
from dae.workdir.model_files import MODEL_FILES, load_model, save_model

# The end of Keras's tutorial: load, predict on noisy test images, stack noisy and denoised ones, show them in grey.
PLAIN_KERAS = """
import sys
import keras, matplotlib, numpy as np
matplotlib.use("agg")
import matplotlib.pyplot as plt
noisy = np.load("noisy.npy")
for name in sys.argv[1:]:
    model = keras.models.load_model(name)
    denoised = model.predict(noisy, verbose=0)
    assert denoised.shape == noisy.shape
    plt.imshow(np.hstack([noisy[:10].reshape(-1, 28), denoised[:10].reshape(-1, 28)]), cmap="gray")
    plt.savefig(f"{name}.png")
    np.save(f"{name}.npy", denoised)
assert "dae" not in sys.modules
"""


@pytest.mark.slow
def test_plain_keras_opens_the_models_without_this_package(tiny_run, tmp_path, mnist):
    noise = np.random.default_rng(0).normal(0, 0.5, (200, 28, 28, 1))
    noisy = np.clip(mnist.test.pixels[:200] / 255 + noise, 0, 1).astype(np.float32)
    np.save(tmp_path / "noisy.npy", noisy)
    for name in MODEL_FILES:
        shutil.copy(tiny_run / name, tmp_path)
    subprocess.run([sys.executable, "-c", PLAIN_KERAS, *MODEL_FILES], cwd=tmp_path, check=True)
    expected = load_model(tiny_run).predict(noisy, verbose=0)
    for name in MODEL_FILES:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-6)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_model_of_a_run_is_saved_with_its_free_size_and_weights_and_no_other_file_is_left(name, tiny_run, tmp_path):
    model = load_model(tiny_run)
    save_model(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    loaded = load_model(tmp_path / name)
    assert loaded.input_shape == (None, None, None, 1)
    for weight, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_evaluate_reports_the_metrics_of_the_run_for_a_model_file_alone(tiny_run, tmp_path):
    """As for the run itself: see test_evaluate_on_the_runs_own_data_repeats_its_report."""
    shutil.copy(tiny_run / "model.h5", tmp_path / "alone.h5")
    report = json.loads((tiny_run / "report.json").read_text())
    done = run_in_process("evaluate.py", "alone.h5", cwd=tmp_path)
    assert done.stderr == ""
    assert f"BCE {report['test_bce']:.4f}" in done.stdout
    assert f"SSIM {report['test_ssim']:.3f}" in done.stdout
    assert (tmp_path / "evaluation.png").read_bytes() == (tiny_run / "denoised.png").read_bytes()


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_in_a_model_file_is_not_run(suffix, tmp_path):
    inputs = keras.Input((28, 28, 1))
    code = keras.layers.Lambda(lambda images: images * 1.0, output_shape=(28, 28, 1))
    hostile = keras.Model(inputs, code(inputs))
    hostile.save(tmp_path / f"lambda{suffix}")
    with pytest.raises(UsageError, match=r"not a readable model .*[Ll]ambda"):
        load_model(tmp_path / f"lambda{suffix}")


def change_archive(
    source: Path, target: Path, name: str, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Copy a .keras file with the content of one of its files changed."""
    with zipfile.ZipFile(source) as model, zipfile.ZipFile(target, "w", compression) as changed:
        for member in model.namelist():
            content = model.read(member)
            changed.writestr(member, change(content) if member == name else content)


def change_architecture(source: Path, target: Path, change: Callable[[str], str]) -> None:
    """Copy a model file with its architecture, JSON text, changed."""
    if target.suffix == ".h5":
        shutil.copy(source, target)
        with h5py.File(target, "r+") as file:
            file.attrs["model_config"] = change(file.attrs["model_config"])
    else:
        change_archive(source, target, "config.json", lambda content: change(content.decode()).encode())


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"filters": 16', '"filtres": 2, "filters": 16', "'filtres'"),
        ('"filters": 16', '"filters": 3', "[Ss]hape"),
        ('"sigmoid"', '"sigmoidd"', "sigmoidd"),
        ('"Conv2D"', '"Mine"', "'.*Mine'"),
        ('"filters": 16', '"filters" 16', "':'"),
    ],
)
def test_a_model_that_keras_cannot_make_is_rejected_with_the_reason(name, before, after, reason, tiny_run, tmp_path):
    change_architecture(tiny_run / name, tmp_path / name, lambda text: text.replace(before, after))
    with pytest.raises(UsageError, match=rf": not a readable model \(.*{reason}") as caught:
        load_model(tmp_path / name)
    assert len(str(caught.value).removeprefix(str(tmp_path))) <= 250
    assert "\n" not in str(caught.value)


def convolution(images: keras.KerasTensor) -> keras.KerasTensor:
    return keras.layers.Conv2D(images.shape[-1] or 1, 3, padding="same")(images)


def models_of_other_kinds() -> dict[str, keras.Model]:
    """Return models that do not take a batch of images to images of the same shape, by what the error says of them."""
    one, two = keras.Input((28, 28, 1), name="one"), keras.Input((28, 28, 1), name="two")
    flat = keras.Input((28, 28))
    return {
        "same shape, got one from [(": keras.Model([one, two], keras.layers.Add()([one, two])),
        "to [(None, 28": keras.Model(one, [convolution(one), convolution(one)]),
        "to (None, 26, 26, 1)": keras.Model(one, keras.layers.Conv2D(1, 3)(one)),
        "to (None, 784)": keras.Model(one, keras.layers.Flatten()(one)),
        "from (None, 28, 28) to": keras.Model(flat, keras.layers.Dense(28)(flat)),
        "got one from (None, 28, 28, 1) to": keras.Model(one, {"image": convolution(one)}),
    }


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_models_of_other_kinds_are_rejected_in_one_line(suffix, tmp_path):
    for number, (reason, model) in enumerate(models_of_other_kinds().items()):
        path = tmp_path / f"{number}{suffix}"
        save_model(model, path)
        with pytest.raises(UsageError) as caught:
            load_model(path)
        message = str(caught.value).removeprefix(str(tmp_path))
        assert reason in message
        assert len(message) <= 250
        assert "\n" not in message


@pytest.mark.parametrize(
    ("shape", "suffix"), [((None, None, 1), ".h5"), ((None, 28, 1), ".keras"), ((None, None, None), ".h5")]
)
def test_a_model_of_free_size_is_loaded_and_evaluated(shape, suffix, tmp_path, mnist):
    images = keras.Input(shape)
    layer = convolution if shape[-1] else keras.layers.Activation("sigmoid")
    save_model(keras.Model(images, layer(images)), tmp_path / f"free{suffix}", EIGHT_BITS)
    model = load_model(tmp_path / f"free{suffix}")
    assert model.input_shape == (None, *shape)
    check_fits(model, mnist.test)
    report = make_evaluator(model)("test", evaluation_batches(mnist.test[:10], RunConfig(noise_level=0.5), "test"))
    assert np.isfinite(list(report.values())).all()


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.999])
def test_truncated_model_file_is_rejected_in_one_line(fraction, name, tiny_run, tmp_path):
    content = (tiny_run / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(fraction * len(content))])
    with rejected(match="not a readable model"):
        load_model(tmp_path / name)


@fuzz
@given(data=st.data())
def test_damaged_model_file_is_rejected_in_one_line_or_loads(tiny_run, tmp_path_factory, data):
    """The archive of a .keras file has checksums, unlike HDF5, whose library can crash on a damaged file."""
    content = bytearray((tiny_run / "model.keras").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.keras"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        load_model(path)
    except UsageError as error:
        assert "\n" not in str(error)


def test_a_model_that_is_missing_from_a_finished_run_is_rejected_with_what_to_do(tmp_path):
    workdir.write_report(tmp_path, {"epoch": 1})
    with pytest.raises(UsageError, match=r"model\.keras: no such file; delete report.json, and repeat .*--resume"):
        load_model(tmp_path)


def test_files_that_are_not_models_are_rejected(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").unlink()
    shutil.rmtree(tmp_path / "unfinished" / "checkpoints")
    for name in ("text.h5", "text.keras", "model.pb"):
        (tmp_path / name).write_text("no model")
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]).save(tmp_path / "dense.keras")
    for name, message in {
        "unfinished": "not a finished run, and without a checkpoint",
        "none.h5": "no such run or model file",
        "text.h5": "not a readable model",
        "text.keras": "not a readable model",
        "model.pb": r"\.keras or \.h5",
        "dense.keras": "images",
    }.items():
        with rejected("", name, match=message):
            load_model(tmp_path / name)
