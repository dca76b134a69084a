import json
import shutil
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import fuzz, run_here, run_script
from hypothesis import given
from hypothesis import strategies as st

from dae.errors import UsageError
from dae.workdir import hdf5_check
from dae.workdir.model_files import load_model

# The tutorial's ending: load, predict on noisy test images, stack noisy beside denoised, show in grey.
PLAIN_KERAS = """
import sys
import keras, matplotlib, numpy as np
matplotlib.use("agg")
import matplotlib.pyplot as plt
model = keras.models.load_model(sys.argv[1])
noisy = np.load("noisy.npy")
denoised = model.predict(noisy, verbose=0)
assert denoised.shape == noisy.shape
plt.imshow(np.hstack([noisy[:10].reshape(-1, 28), denoised[:10].reshape(-1, 28)]), cmap="gray")
plt.savefig("shown.png")
np.save("denoised.npy", denoised)
assert "dae" not in sys.modules
"""


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_plain_keras_opens_the_model_without_this_package(name, tiny_run, tmp_path, mnist):
    noise = np.random.default_rng(0).normal(0, 0.5, (200, 28, 28, 1))
    noisy = np.clip(mnist.test[:200] / 255 + noise, 0, 1).astype(np.float32)
    np.save(tmp_path / "noisy.npy", noisy)
    shutil.copy(tiny_run / name, tmp_path)
    subprocess.run([sys.executable, "-c", PLAIN_KERAS, name], cwd=tmp_path, check=True)
    assert (tmp_path / "shown.png").stat().st_size > 1000
    expected = load_model(tiny_run).predict(noisy, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "denoised.npy"), expected, atol=1e-6)


def test_evaluate_reports_the_same_figures_for_the_run_and_its_files(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copy(run / "model.h5", tmp_path / "alone.h5")
    report = json.loads((run / "report.json").read_text())
    for model, evaluate in ((run, run_script), (run / "model.keras", run_here), (tmp_path / "alone.h5", run_here)):
        done = evaluate("evaluate.py", model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"BCE {report['test_bce']:.4f}" in done.stdout
        assert f"PSNR {report['test_psnr']:.2f} dB, SSIM {report['test_ssim']:.3f}" in done.stdout
    assert (run / "evaluation.png").read_bytes() == (run / "denoised.png").read_bytes()
    assert (tmp_path / "evaluation.png").exists()
    other = run_here("evaluate.py", run, "--noise-level", "0.2", "--figure", tmp_path / "less.png", cwd=tmp_path)
    assert f"PSNR {report['test_psnr']:.2f} dB" not in other.stdout
    assert (tmp_path / "less.png").exists()


def hostile_layer() -> keras.Model:
    inputs = keras.Input((28, 28, 1))
    return keras.Model(inputs, keras.layers.Lambda(lambda images: images * 1.0)(inputs))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_in_a_model_file_is_not_run(suffix, tmp_path):
    hostile_layer().save(tmp_path / f"lambda{suffix}")
    with pytest.raises(UsageError, match=r"not a readable model .*[Ll]ambda"):
        load_model(tmp_path / f"lambda{suffix}")


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_layer_of_terabytes_is_refused_before_it_is_made(name, tiny_run, tmp_path):
    path = tmp_path / name
    shutil.copy(tiny_run / name, path)

    def grown(architecture: str) -> str:
        return architecture.replace('"filters": 16', '"filters": 100000000000').replace(
            "28, 28, 16]", "28, 28, 100000000000]"
        )

    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = grown(file.attrs["model_config"])
    else:
        with zipfile.ZipFile(tiny_run / name) as model, zipfile.ZipFile(path, "w") as changed:
            for member in model.namelist():
                content = model.read(member)
                changed.writestr(member, grown(content.decode()) if member == "config.json" else content)
    with pytest.raises(UsageError, match=r"not a readable model|more than it has bytes"):
        load_model(path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@fuzz
@given(data=st.data())
def test_any_damage_to_a_model_file_is_refused_in_one_line_or_harmless(name, tiny_run, tmp_path_factory, data):
    content = bytearray((tiny_run / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        load_model(path)
    except UsageError as error:
        assert "\n" not in str(error)


def test_a_file_that_holds_the_hdf5_library_for_ever_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_check, "SECONDS_ALLOWED", 5.0)
    hdf5_check.check(tiny_run / "model.h5")
    content = bytearray((tiny_run / "model.h5").read_bytes())
    # Found by the test above: a wrong size of the free space in the heap that holds the names of the weights.
    content[content.rindex(b"GCOL") + 1048] = 130
    (tmp_path / "endless.h5").write_bytes(content)
    with pytest.raises(UsageError, match=r"not a readable model .reading it takes more than 5 seconds"):
        load_model(tmp_path / "endless.h5")


def test_what_is_no_model_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").unlink()
    (tmp_path / "text.h5").write_text("no model")
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "model.pb").write_text("no model")
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]).save(tmp_path / "dense.keras")
    for name, message in {
        "unfinished": "not a finished run",
        "none.h5": "no such file",
        "text.h5": "not a readable model",
        "text.keras": "not a readable model",
        "model.pb": "neither a run's folder nor a .keras or .h5 file",
        "dense.keras": "no denoiser of images",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    done = run_here("evaluate.py", tmp_path / "text.h5")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
