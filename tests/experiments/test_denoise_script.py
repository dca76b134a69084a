import csv
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import file_size_limit, run_in_process, run_subprocess

import dae
from dae.config import RunConfig
from dae.data import pictures
from dae.models import networks, sizes
from dae.workdir.model_files import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A grey network, saved."""
    path = tmp_path_factory.mktemp("model") / "patches.keras"
    save_model(sizes.any_size(networks.build(RunConfig(model="patches"), (28, 28, 1))), path)
    return path


@pytest.fixture
def folder(tmp_path, mnist) -> Path:
    """Pictures of digits of two sizes, formats, and bit depths, and arrays, in a folder with a subfolder."""
    inputs = tmp_path / "in"
    (inputs / "sub").mkdir(parents=True)
    for number in range(5):
        pictures.write(inputs / "sub" / f"{number}.png", mnist.test.pixels[number])
    pictures.write(inputs / "deep.png", mnist.test.pixels[0].repeat(3, axis=2).astype(np.uint16) * 257)
    pictures.write(inputs / "photo.JPG", mnist.test.pixels[1, :20].repeat(3, axis=2))
    pictures.write(
        inputs / "clear.png", mnist.test.pixels[2], alpha=mnist.test.pixels[3, ..., 0], icc_profile=b"profile" * 30
    )
    np.save(inputs / "digits.npy", mnist.test.pixels[:7, ..., 0])
    np.savez_compressed(
        inputs / "set.npz", x=mnist.test.pixels[:3] / np.float32(255), y=np.arange(3), words=np.array(["a"])
    )
    (inputs / "notes.txt").write_text("no picture")
    (inputs / ".hidden.png").write_text("no picture")
    return inputs


def test_outputs_keep_names_sizes_formats_and_depths(model, folder, tmp_path):
    done = run_in_process("denoise.py", model, "in", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("notes.txt", ".hidden.png")
    }
    for path in written:
        if path.suffix not in (".npy", ".npz"):
            assert pictures.read_header(tmp_path / "out" / path) == pictures.read_header(folder / path)
    network = dae.load_model(model)
    for name in ("sub/3.png", "deep.png"):
        expected = dae.denoise(network, pictures.read(folder / name))
        np.testing.assert_array_equal(pictures.read(tmp_path / "out" / name), expected)
    clear, before = (pictures.read_with_alpha(path / "clear.png") for path in (tmp_path / "out", folder))
    np.testing.assert_array_equal(clear.alpha, before.alpha)
    np.testing.assert_array_equal(clear.pixels, dae.denoise(network, before.pixels))
    assert clear.icc_profile == before.icc_profile
    digits = np.load(folder / "digits.npy")
    np.testing.assert_array_equal(
        np.load(tmp_path / "out" / "digits.npy"), dae.denoise(network, digits[..., None])[..., 0]
    )
    with np.load(tmp_path / "out" / "set.npz") as arrays, np.load(folder / "set.npz") as sources:
        np.testing.assert_allclose(arrays["x"], dae.denoise(network, sources["x"]), atol=1e-6)
        np.testing.assert_array_equal(arrays["y"], sources["y"])
        np.testing.assert_array_equal(arrays["words"], sources["words"])
    assert "copied unchanged: y, words of in/set.npz" in done.stdout
    assert "skipped other files: 1 .txt" in done.stdout
    assert "processing 2 colour pictures per channel with a grey network" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("denoised 8 pictures and 2 array files (")
    again = run_in_process("denoise.py", model, "in", "--output", "out", cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--overwrite" in again.stderr
    assert run_in_process("denoise.py", model, "in", "--output", "out", "--overwrite", cwd=tmp_path).returncode == 0


def test_a_run_uses_its_value_range_unless_another_is_given(tiny_run, tmp_path, mnist):
    shutil.copytree(tiny_run, tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text().replace('"value_range": null', '"value_range": [0, 4095]')
    (tmp_path / "run" / "config.json").write_text(config)
    twelve_bits = np.rint(mnist.test.pixels[0] / 255 * 4095).astype(np.uint16)
    pictures.write(tmp_path / "a.tif", twelve_bits)
    for flags, expected in (((), (0, 4095)), (("--value-range", 0, 8000), (0, 8000))):
        done = run_in_process("denoise.py", "run", "a.tif", "--output", "out", "--overwrite", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        denoised = dae.denoise(tiny_run, twelve_bits, value_range=expected)
        np.testing.assert_array_equal(pictures.read(tmp_path / "out" / "a.tif"), denoised)


def test_clean_images_give_metrics_and_show_gives_comparisons(model, folder, tmp_path, mnist):
    rng = np.random.default_rng(0)
    noisy = np.clip(mnist.test.pixels[:2] + rng.normal(0, 50, (2, 28, 28, 1)), 0, 255).astype(np.uint8)
    (tmp_path / "noisy").mkdir()
    pictures.write(tmp_path / "noisy" / "0.png", noisy[0])
    np.save(tmp_path / "noisy" / "digits.npy", noisy)
    (tmp_path / "clean").mkdir()
    pictures.write(tmp_path / "clean" / "0.png", mnist.test.pixels[0])
    np.save(tmp_path / "clean" / "digits.npy", mnist.test.pixels[:2])
    flags = ("--output", "out", "--clean", "clean", "--show")
    done = run_in_process("denoise.py", model, "noisy", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["image"]) for row in rows] == [
        ("noisy/0.png", "0"),
        ("noisy/digits.npy", "0"),
        ("noisy/digits.npy", "1"),
    ]
    denoised = np.load(tmp_path / "out" / "digits.npy")
    for row, noisy_image, denoised_image, clean in zip(rows[1:], noisy, denoised, mnist.test.pixels, strict=False):
        for name, image in (("psnr_input", noisy_image), ("psnr_output", denoised_image)):
            mse = np.mean((image / 255 - clean / 255) ** 2)
            assert float(row[name]) == pytest.approx(-10 * np.log10(mse), abs=1e-3)
        assert 0 < float(row["ssim_input"]) < 1
    before, after = (np.mean([float(row[name]) for row in rows]) for name in ("psnr_input", "psnr_output"))
    assert f"PSNR {before:.2f} dB before, {after:.2f} dB after" in done.stdout
    shown = pictures.read(tmp_path / "out" / "0-comparison.png")
    expected = np.concatenate([noisy[0], pictures.read(tmp_path / "out" / "0.png"), mnist.test.pixels[0]], axis=1)
    np.testing.assert_array_equal(shown, expected)
    assert pictures.read(tmp_path / "out" / "digits-comparison.png").shape == (56, 84, 1)


def test_what_is_no_image_in_an_npz_file_is_copied_and_any_name_can_be_shown(model, tmp_path, mnist):
    labels = np.eye(10, dtype=np.float32)[:3]
    np.savez(tmp_path / "a.npz", **{"x/1": mnist.test.pixels[:3], "y": labels})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("notes.txt", "text")
    done = run_in_process("denoise.py", model, "a.npz", "--output", "out", "--show", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "copied unchanged: notes.txt, y of a.npz" in done.stdout
    with np.load(tmp_path / "out" / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["y"], labels)
    with zipfile.ZipFile(tmp_path / "out" / "a.npz") as archive:
        assert archive.read("notes.txt") == b"text"
    assert (tmp_path / "out" / "a-comparison-x-1.png").exists()
    (tmp_path / "out" / "a.npz").unlink()
    done = run_in_process("denoise.py", model, "a.npz", "--output", "out", "--show", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--output: would replace out/a-comparison-x-1.png" in done.stderr


@pytest.mark.slow
def test_names_that_are_no_unicode_are_read_written_and_shown(model, tmp_path, mnist, monkeypatch):
    for folder in ("in", "clean"):
        (tmp_path / folder).mkdir()
        pictures.write(tmp_path / folder / "\udcff.png", mnist.test.pixels[0])
    (tmp_path / "in" / "\udcfe.png").write_text("broken")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    flags = ("--output", "out", "--clean", "clean", "--skip-broken")
    done = run_subprocess("denoise.py", model, "in", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"skipped broken files: in/\udcfe.png" in done.stdout
    assert b"in/\xff.png,0," in (tmp_path / "out" / "metrics.csv").read_bytes()


def test_a_write_that_fails_is_reported_in_one_line_and_leaves_nothing(model, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((300, 300), np.uint8))
    with file_size_limit(60_000):
        done = run_in_process("denoise.py", model, "a.npy", "--output", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_broken_pictures_are_rejected_or_skipped(model, folder, tmp_path):
    (folder / "empty.png").write_bytes(b"")
    cut = folder / "sub" / "2.png"  # whose header is readable
    cut.write_bytes(cut.read_bytes()[:-30])
    done = run_in_process("denoise.py", model, "in", "--output", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "in/empty.png: not readable" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_in_process("denoise.py", model, "in", "--output", "out", "--skip-broken", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped broken files: in/empty.png" in done.stdout
    assert "skipped broken files: in/sub/2.png" in done.stdout
    assert "denoised 7 pictures" in done.stdout
    assert not (tmp_path / "out" / "sub" / "2.png").exists()
