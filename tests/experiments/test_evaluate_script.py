"""experiments/evaluate.py on images of the user, and on those of the run."""

import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import denoised_by_hand, run_in_process
from PIL import Image

from dae.evaluation.metrics import METRICS
from dae.workdir.model_files import load_model


@pytest.mark.parametrize(("suffix", "size"), [(".png", (29, 43)), (".npy", (11, 90))])
def test_evaluate_takes_one_image_of_any_size_without_noise(suffix, size, finished_run, mnist, tmp_path):
    image = np.tile(mnist.test.pixels[0, ..., 0], (4, 4))[: size[0], : size[1]]
    if suffix == ".npy":
        np.save(tmp_path / "one.npy", image[None])
    else:
        (tmp_path / "one").mkdir()
        Image.fromarray(image).save(tmp_path / "one" / "a.png")
    place = tmp_path / ("one.npy" if suffix == ".npy" else "one")
    run = finished_run("pairs")
    done = run_in_process("evaluate.py", run, "--data", place, "--noise-level", 0, "--figure", tmp_path / "a.png")
    assert done.stderr == ""
    clean = image / np.float32(255)
    psnr = METRICS["psnr"](tf.constant(clean[None, ..., None]), tf.constant(denoised_by_hand(load_model(run), clean)))
    assert "gaussian noise 0, clipped: BCE " in done.stdout
    assert f"PSNR {float(psnr[0]):.2f} dB" in done.stdout
    assert f"test: 1 image, {size[0]} x {size[1]}, grey, uint8" in done.stdout
    assert tf.io.decode_png((tmp_path / "a.png").read_bytes()).shape[0] > 100


def test_evaluate_takes_pairs_of_several_sizes_and_adds_no_noise_to_them_unless_it_is_given(tiny_run, files, tmp_path):
    """Also for a run on images of one size that was trained on noise of level 0.5."""
    arguments = ("--data", files / "pairs", "--value-range", 0, 4095, "--figure", tmp_path / "a.png")
    done = run_in_process("evaluate.py", tiny_run, *arguments)
    assert done.stderr == ""
    assert "test: 3 pairs of noisy and clean images, 20 x 14 to 30 x 41, grey, uint16" in done.stdout
    assert " on pairs of noisy and clean images: " in done.stdout
    done = run_in_process("evaluate.py", tiny_run, *arguments, "--image-size", 28, "--noise-levels", 0, 0.1)
    assert done.stderr == ""
    assert "3 pairs of noisy and clean images, 28 x 28" in done.stdout
    assert "| gaussian | 0.1 |" in done.stdout


def test_evaluate_on_the_runs_own_data_repeats_its_report(finished_run, tmp_path):
    run = finished_run("pairs")
    done = run_in_process("evaluate.py", run, "--figure", tmp_path / "a.png")
    assert done.stderr == ""
    report = json.loads((run / "report.json").read_text())
    assert (
        f"PSNR {report['test_psnr']:.2f} dB ({report['test_psnr_of_mean_mse']:.2f} dB of the mean MSE)" in done.stdout
    )
    assert f"SSIM {report['test_ssim']:.3f}" in done.stdout


def test_a_single_test_image_is_plotted_at_several_noise_levels(tiny_run, tmp_path, mnist):
    np.save(tmp_path / "one.npy", mnist.test.pixels[:1])
    arguments = ("--data", "one.npy", "--noise-levels", 0, 0.5, "--figure", "plot.png")
    done = run_in_process("evaluate.py", tiny_run, *arguments, cwd=tmp_path)
    assert done.stderr == ""
    assert tf.io.decode_png((tmp_path / "plot.png").read_bytes()).shape[0] > 100


def test_evaluate_takes_a_volume_by_its_axes(finished_run, tmp_path, mnist):
    slices = mnist.test.pixels[:12, :16, :16, 0]
    texts = []
    for name, array, axes in (("first", slices, "ZYX"), ("last", np.moveaxis(slices, 0, -1), "YXZ")):
        np.save(tmp_path / f"{name}.npy", array)
        data = ("--data", tmp_path / f"{name}.npy", "--axes", axes, "--figure", tmp_path / "a.png")
        done = run_in_process("evaluate.py", finished_run("pairs"), *data)
        assert done.stderr == ""
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert "test: 12 images, 16 x 16, grey, uint8" in texts[0]
