"""The models of the package: what they do to a photograph with and without noise, and how they are recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import run_subprocess
from PIL import Image

import dae
from dae import config as config_module
from dae.errors import UsageError
from dae.inference.denoise import PRETRAINED, Denoiser
from dae.workdir.model_files import load_model, weights_digest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A clean photograph in colour, float32 in [0, 1]: the last square of a picture of docs/pretrained.md."""
    with Image.open(ROOT / "docs" / "images" / "cat.jpg") as figure:
        part = figure.crop((figure.width - 300, 18, figure.width, figure.height))
    return np.asarray(part, np.float32) / np.float32(255)


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((clean - image) ** 2)))


@pytest.mark.parametrize(
    ("grey", "sigma", "gain"), [(True, 25, 8), pytest.param(False, 25, 9, marks=pytest.mark.slow), (False, 50, 11)]
)
def test_noise_of_any_level_is_removed_from_photographs_in_grey_and_colour(grey, sigma, gain, photograph):
    clean = photograph.mean(axis=2) if grey else photograph
    noisy = clean + np.float32(sigma / 255) * np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    denoised = dae.denoise(noisy)
    assert psnr(clean, denoised) > psnr(clean, noisy) + gain
    assert psnr(clean, dae.denoise(noisy, self_ensemble=True)) > psnr(clean, denoised)
    channels = 1 if grey else 3
    tiles = Denoiser(tile_pixels=1)
    assert len(tiles.of(channels)._tiles((300, 300), channels)[1]) > 1
    np.testing.assert_allclose(tiles(noisy), denoised, atol=1e-6)


def test_a_clean_photograph_is_nearly_unchanged(photograph):
    pixels = np.rint(255 * photograph).astype(np.uint8)
    denoised = dae.denoise(pixels)
    assert denoised.dtype == np.uint8
    assert psnr(photograph, denoised / np.float32(255)) > 38


@pytest.mark.parametrize("name", ["grey", "colour"])
def test_the_report_of_each_model_has_the_digest_of_its_weights(name):
    report = json.loads((PRETRAINED / name / "report.json").read_text())
    assert weights_digest(load_model(PRETRAINED / name)) == report["weights_sha256"]
    assert Path(config_module.read(PRETRAINED / name / "config.json").data or "").name == "photographs"
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("model.keras")) < 3e6
    page = (ROOT / "docs" / "pretrained.md").read_text()
    assert report["weights_sha256"] in page


def test_the_old_order_of_arguments_says_what_to_write_instead(tiny_run, tmp_path, photograph):
    with pytest.raises(UsageError, match=r"^dae.denoise takes the image first: write dae.denoise\(image, model\)$"):
        dae.denoise(str(tiny_run), photograph)  # type: ignore[arg-type]
    done = run_subprocess("denoise.py", tiny_run, "a.png", "--output", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"denoise.py: {tiny_run}: a model, not images; write --model {tiny_run}\n",
    )


@pytest.mark.slow
def test_a_picture_is_denoised_with_nothing_trained(tmp_path, photograph):
    Image.fromarray(np.rint(255 * photograph).astype(np.uint8)).save(tmp_path / "holiday.png")
    done = run_subprocess("denoise.py", "holiday.png", "--output", "denoised", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "denoised" / "holiday.png") as denoised:
        assert denoised.size == photograph.shape[1::-1]
