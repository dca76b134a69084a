"""The public names of `dae`, its use from Python, and the figure of denoised images."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY
from PIL import Image

import dae
from dae import config
from dae.data.images import Images
from dae.reporting import plots


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_dir_lists_what_is_public_and_nothing_else():
    assert set(dir(dae)) == {*dae.__all__, "__version__"}
    assert {"train", "preset", "RunConfig", "UsageError", "RunError", "Interrupted"} < set(dae.__all__)
    assert all(getattr(dae, name).__doc__ for name in dae.__all__)


def test_presets_are_configurations_by_name():
    assert dae.preset("good", epochs=3) == dae.RunConfig(**{**config.PRESETS["good"], "epochs": 3})
    with pytest.raises(dae.UsageError, match="unknown name 'goood'; did you mean 'good'"):
        dae.preset("goood")


def test_a_dictionary_is_no_configuration(tmp_path):
    with pytest.raises(dae.UsageError, match=r"^config: expected dae.RunConfig.* or dae.preset.*, got a dict$"):
        dae.train({"epochs": 1}, tmp_path / "run")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_keras_with_another_backend_is_rejected_in_one_line():
    """A module stands for Keras, whose other backends need packages that are not installed here."""
    keras = "import sys, types; keras = sys.modules['keras'] = types.ModuleType('keras')"
    done = run_python(f"{keras}; keras.config = types.SimpleNamespace(backend=lambda: 'jax'); import dae")
    message = "keras: was imported with the backend jax, but dae needs tensorflow; import dae first, or set "
    assert done.stderr.splitlines()[-1] == f"dae.errors.UsageError: {message}KERAS_BACKEND=tensorflow"


@pytest.mark.slow
def test_a_quiet_training_prints_nothing_from_python(tmp_path):
    code = f"""
import dae
config = dae.RunConfig(train_examples=64, validation_examples=64, epochs=1, bce_steps=0)
dae.train(config, "{tmp_path}/run", quiet=True)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("shape", "columns"), [((28, 28), 10), ((1100, 40), 4)])
def test_denoised_images_are_shown_whole_and_at_a_bounded_size(shape, columns, tmp_path, mnist):
    images = Images(np.tile(mnist.test.pixels[:1], (12, 54, 18, 1))[:, : shape[0], : shape[1]])
    seen = []

    def denoise(noisy: tf.Tensor) -> tf.Tensor:
        seen.append(tuple(noisy.shape))
        return noisy

    plots.save_denoised(tmp_path / "denoised.png", images, dae.RunConfig(**{**vars(TINY), "patch_size": 16}), denoise)
    assert seen == [(1, *shape, 1)] * columns
    with Image.open(tmp_path / "denoised.png") as picture:
        assert 1000 < picture.width < 2200
        assert picture.height < 2300
