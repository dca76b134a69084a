"""Pictures are denoised by networks that are trained on them alone."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import EXPERIMENTS, ended, photograph, psnr
from PIL import Image

import dae
from dae import config as config_module
from dae.data.images import Images
from dae.errors import UsageError
from dae.inference.zero_shot import ZeroShot

# The settings of the command, with two steps.
SHORT = config_module.preset("zero_shot", patches_per_epoch=16, epochs=2)


@pytest.fixture(scope="module")
def denoiser() -> ZeroShot:
    return ZeroShot(SHORT)


@pytest.fixture(scope="module")
def shading() -> np.ndarray:
    """A smooth picture without noise, float32 [150, 200] from 0.2 to 0.8."""
    rows, columns = np.mgrid[:150, :200] / 150
    return (0.5 + 0.3 * np.sin(6 * rows) * np.cos(5 * columns)).astype(np.float32)


def white(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture + 0.1 * rng.standard_normal(picture.shape, np.float32)


def photons(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(30 * picture).astype(np.float32) / 30


def correlated(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = 0.05 * rng.standard_normal(picture.shape, np.float32)
    return picture + sum(np.roll(noise, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1)))


@pytest.mark.parametrize(
    ("add_noise", "loss", "out", "err"),
    [
        (white, "recorrupted", r"a\.png: standard deviation 2[56]\..*; trains with recorrupted\n", ""),
        (photons, "neighbor2neighbor", ".*rises with the brightness.*; trains with neighbor2neighbor\n", ""),
        (correlated, "neighbor2neighbor", "", "warning: a.png: .*; noise correlated .*; trains with .*\n"),
    ],
)
def test_the_loss_is_chosen_by_the_noise_that_is_found(add_noise, loss, out, err, denoiser, shading, capfd):
    noisy = Images(np.stack([add_noise(shading, np.random.default_rng(seed)) for seed in (0, 1)])[..., None])
    chosen, is_noisy = denoiser.settings(noisy, "a.png")
    assert (is_noisy, chosen.loss) == (True, loss)
    assert chosen.noise_level == (pytest.approx(0.1, rel=0.03) if add_noise is white else None)
    printed = capfd.readouterr()
    assert re.fullmatch(out, printed.out), printed
    assert re.fullmatch(err, printed.err), printed


def test_a_level_that_is_given_is_used_for_any_noise_and_without_noise(shading):
    denoiser = ZeroShot(replace(SHORT, noise_level=0.2))
    for picture in (shading, photons(shading, np.random.default_rng(0))):
        chosen, is_noisy = denoiser.settings(Images(picture[None, ..., None]), "a.png")
        assert (is_noisy, chosen.loss, chosen.noise_level) == (True, "recorrupted", 0.2)


@pytest.mark.slow
def test_pictures_without_noise_are_denoised_without_training_also_after_one_with_noise(denoiser, shading, capfd):
    noisy = white(shading, np.random.default_rng(0))
    assert not np.array_equal(denoiser(noisy), dae.denoise(noisy))
    for picture in (shading, np.full((2, 11, 13), 255, np.uint8)):
        pixels: list[int] = []
        capfd.readouterr()
        np.testing.assert_array_equal(denoiser(picture, progress=pixels.append), dae.denoise(picture))
        warning = capfd.readouterr().err
        assert warning.startswith("warning: images: standard deviation 0.")
        assert "; no noise found; " in warning
        assert warning.endswith("; denoises without training\n")
        assert sum(pixels) == picture.size


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [((11, 13), np.uint8), ((3, 30, 28, 3), np.uint16)])
def test_tiny_pictures_and_stacks_in_colour_stay_about_what_they_are(shape, dtype):
    white = np.iinfo(dtype).max
    noisy = np.random.default_rng(0).normal(0.6 * white, 0.05 * white, shape).astype(dtype)
    denoised = ZeroShot(SHORT)(noisy)
    assert (denoised.shape, denoised.dtype) == (noisy.shape, noisy.dtype)
    np.testing.assert_allclose(denoised, 0.6 * white, atol=0.2 * white)


def test_values_and_sizes_that_cannot_be_trained_on_are_one_line(denoiser):
    with pytest.raises(UsageError, match=r"^expected finite values, got NaN or infinity$"):
        denoiser(np.full((28, 28), np.nan, np.float32))
    with pytest.raises(UsageError, match=r"^expected images of at least 11 x 11, the window of SSIM, got 28 x 10$"):
        denoiser(np.zeros((28, 10), np.uint8))


@pytest.mark.slow
def test_noise_of_photons_is_removed_better_than_by_the_pretrained_model():
    clean, peak = photograph() @ np.array([0.299, 0.587, 0.114], np.float32), np.float32(20)
    noisy = np.random.default_rng(0).poisson(peak * clean).astype(np.float32) / peak
    adapted = ZeroShot(config_module.preset("zero_shot", epochs=4))(noisy)
    assert psnr(clean, noisy) + 6 < psnr(clean, dae.denoise(noisy)) + 0.1 < psnr(clean, adapted)


# The command with the settings of SHORT.
COMMAND = """
import runpy, sys
from dae import config
config.PRESETS["zero_shot"].update(patches_per_epoch=16, epochs=2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """Start the command in a process, which the test must end."""
    command: list[str | Path] = [sys.executable, "-c", COMMAND, EXPERIMENTS / "denoise.py", "--zero-shot", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_leaves_no_output_and_the_same_seed_gives_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("first.png", "second.png"):
        noisy = photograph()[:24, :24].mean(axis=2) + 0.1 * rng.standard_normal((24, 24))
        Image.fromarray(np.clip(np.rint(255 * noisy), 0, 255).astype(np.uint8)).save(tmp_path / name)
    ((status, stdout, stderr),) = ended(
        [start("first.png", "second.png", "--output", "whole", cwd=tmp_path)], timeout=300
    )
    assert status == 0, stderr
    *lines, summary = stdout.splitlines()
    assert summary.startswith("denoised 2 of 2 files")
    assert [line.partition(": ")[0] for line in lines] == ["first.png", "second.png"]

    killed = start("first.png", "second.png", "--output", "killed", cwd=tmp_path)
    while not (tmp_path / "killed" / "first.png").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    ended([killed])
    left = [path for path in (tmp_path / "killed").iterdir() if not path.name.startswith(".")]
    assert left == [tmp_path / "killed" / "first.png"]

    ((status, _, stderr),) = ended([start("second.png", "--output", "killed", cwd=tmp_path)], timeout=300)
    assert status == 0, stderr
    for name in ("first.png", "second.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
