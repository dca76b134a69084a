"""Pictures are denoised by networks that are trained on them alone."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import EXPERIMENTS, run_in_process, run_subprocess
from PIL import Image

import dae
from dae import config as config_module
from dae.errors import UsageError
from dae.inference.zero_shot import ZeroShot

CAT = Path(__file__).parent.parent.parent / "docs" / "images" / "cat.jpg"
# The settings of the command, with two steps.
SHORT = config_module.preset("zero_shot", patches_per_epoch=16, epochs=2)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A clean photograph in grey, float32 in [0, 1]: the last square of a picture of docs/pretrained.md."""
    with Image.open(CAT) as figure:
        part = figure.crop((figure.width - 300, 18, figure.width, figure.height)).convert("L")
    return np.asarray(part, np.float32) / np.float32(255)


@pytest.mark.slow
@pytest.mark.parametrize("picture", [np.full((11, 13), 255, np.uint8), np.full((3, 30, 28, 3), 9, np.uint16)])
def test_constant_tiny_and_saturated_pictures_and_stacks_in_colour_stay_what_they_are(picture):
    denoised = ZeroShot(SHORT)(picture)
    assert (denoised.shape, denoised.dtype) == (picture.shape, picture.dtype)
    np.testing.assert_allclose(denoised, picture, atol=0.05 * np.iinfo(picture.dtype).max)


def test_values_and_sizes_that_cannot_be_trained_on_are_one_line():
    denoiser = ZeroShot(SHORT)
    with pytest.raises(UsageError, match=r"^expected finite values, got NaN or infinity$"):
        denoiser(np.full((28, 28), np.nan, np.float32))
    with pytest.raises(UsageError, match=r"^expected images of at least 11 x 11, the window of SSIM, got 28 x 10$"):
        denoiser(np.zeros((28, 10), np.uint8))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--zero-shot --model runs/mine", "--zero-shot: starts from the package's models; leave out --model"),
        ("--noise-level 0.1", "--noise-level: applies to --zero-shot, which is not given"),
    ],
)
def test_flags_that_do_not_fit_zero_shot_are_rejected(flags, message, tmp_path):
    done = run_in_process("denoise.py", CAT, "--output", "out", *flags.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"denoise.py: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_noise_of_photons_is_removed_better_than_by_the_pretrained_model(photograph):
    peak = np.float32(20)
    noisy = np.random.default_rng(0).poisson(peak * photograph).astype(np.float32) / peak
    psnr = {
        name: -10 * np.log10(np.mean((photograph - image) ** 2))
        for name, image in {
            "noisy": noisy,
            "pretrained": dae.denoise(noisy),
            "zero shot": ZeroShot(config_module.preset("zero_shot", epochs=4))(noisy),
        }.items()
    }
    assert psnr["noisy"] + 6 < psnr["pretrained"] + 0.1 < psnr["zero shot"]


@pytest.mark.slow
def test_a_kill_leaves_no_output_and_the_same_seed_gives_the_same_bits(photograph, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("first.png", "second.png"):
        noisy = photograph[:24, :24] + 0.1 * rng.standard_normal((24, 24))
        Image.fromarray(np.clip(np.rint(255 * noisy), 0, 255).astype(np.uint8)).save(tmp_path / name)
    command = ("denoise.py", "first.png", "second.png", "--zero-shot", "--output")
    done = run_subprocess(*command, "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("denoised 2 images in 2 files")

    script, *arguments = command
    killed = subprocess.Popen([sys.executable, EXPERIMENTS / script, *arguments, "killed"], cwd=tmp_path)
    while not (tmp_path / "killed" / "first.png").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    left = [path for path in (tmp_path / "killed").iterdir() if not path.name.startswith(".")]
    assert left == [tmp_path / "killed" / "first.png"]

    done = run_subprocess("denoise.py", "second.png", "--zero-shot", "--output", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("first.png", "second.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
