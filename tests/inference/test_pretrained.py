"""The models of the package: what they do to a photograph with and without noise, and how they are recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import photograph, psnr, run_subprocess
from PIL import Image

import dae
from dae import config as config_module
from dae.errors import UsageError
from dae.inference.denoise import PRETRAINED
from dae.workdir.model_files import load_model, weights_digest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("grey", "sigma", "gain"), [(True, 25, 7), (False, 50, 12)])
def test_noise_is_removed_from_a_photograph_in_grey_and_colour_and_more_of_it_with_self_ensemble(grey, sigma, gain):
    clean = photograph()[:128, 60:188]
    clean = clean.mean(axis=2) if grey else clean
    noisy = clean + np.float32(sigma / 255) * np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    denoised = dae.denoise(noisy)
    assert psnr(clean, denoised) > psnr(clean, noisy) + gain
    assert psnr(clean, dae.denoise(noisy, self_ensemble=True)) > psnr(clean, denoised)


def test_a_clean_photograph_is_nearly_unchanged():
    clean = photograph()[:128, 60:188]
    denoised = dae.denoise(np.rint(255 * clean).astype(np.uint8))
    assert denoised.dtype == np.uint8
    assert psnr(clean, denoised / np.float32(255)) > 45


@pytest.mark.parametrize("name", ["grey", "colour"])
def test_each_model_is_recorded_with_its_data_and_digest_and_all_are_small(name):
    report = json.loads((PRETRAINED / name / "report.json").read_text())
    assert weights_digest(load_model(PRETRAINED / name)) == report["weights_sha256"]
    assert Path(config_module.read(PRETRAINED / name / "config.json").data or "").name == "photographs"
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("model.keras")) < 3e6
    page = (ROOT / "docs" / "pretrained.md").read_text()
    assert report["weights_sha256"] in page


def test_the_old_order_of_arguments_says_what_to_write_instead():
    with pytest.raises(UsageError, match=r"^dae.denoise takes the image first: write dae.denoise\(image, model\)$"):
        dae.denoise(str(PRETRAINED / "grey"), np.zeros((28, 28)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_picture_is_denoised_with_nothing_trained(tmp_path):
    Image.fromarray(np.rint(255 * photograph()[:60, :50]).astype(np.uint8)).save(tmp_path / "holiday.png")
    run_subprocess("denoise.py", "holiday.png", "--output", "denoised", cwd=tmp_path)
    with Image.open(tmp_path / "denoised" / "holiday.png") as denoised:
        assert denoised.size == (50, 60)
