import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import EIGHT_BITS, file_size_limit, run_in_process, run_subprocess

import dae
from dae.config import RunConfig
from dae.data import pictures
from dae.data.values import ValueRange
from dae.inference.denoise import PRETRAINED
from dae.models import networks, sizes
from dae.workdir.model_files import load_model, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A grey network, saved."""
    path = tmp_path_factory.mktemp("model") / "patches.keras"
    save_model(sizes.any_size(networks.build(RunConfig(model="patches"), (28, 28, 1))), path, EIGHT_BITS)
    return path


@pytest.fixture
def folder(tmp_path, mnist) -> Path:
    """Digits in pictures of several sizes, formats and bit depths, a stack and arrays, in a folder with a subfolder."""
    inputs = tmp_path / "in"
    (inputs / "sub").mkdir(parents=True)
    for number in range(5):
        pictures.write(inputs / "sub" / f"{number}.png", mnist.test.pixels[number : number + 1])
    pictures.write(inputs / "deep.png", mnist.test.pixels[:1].repeat(3, axis=3).astype(np.uint16) * 257)
    pictures.write(inputs / "photo.JPG", mnist.test.pixels[1:2, :20].repeat(3, axis=3))
    pictures.write(inputs / "colours.png", mnist.test.pixels[2:3], icc_profile=b"profile" * 30)
    pictures.write(inputs / "stack.tif", mnist.test.pixels[:5])
    np.save(inputs / "digits.npy", mnist.test.pixels[:7, ..., 0])
    np.savez_compressed(
        inputs / "set.npz", x=mnist.test.pixels[:3] / np.float32(255), y=np.arange(3), words=np.array(["a"])
    )
    (inputs / "notes.txt").write_text("no picture")
    (inputs / ".hidden.png").write_text("no picture")
    return inputs


def test_outputs_keep_names_sizes_formats_and_depths(model, folder, tmp_path):
    done = run_in_process("denoise.py", "--model", model, "in", "--output", "out", cwd=tmp_path)
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
    for name in ("sub/3.png", "deep.png", "stack.tif"):
        expected = dae.denoise(pictures.read(folder / name), network)
        np.testing.assert_array_equal(pictures.read(tmp_path / "out" / name), expected)
    assert pictures.read_picture(tmp_path / "out" / "colours.png").icc_profile == b"profile" * 30
    digits = np.load(folder / "digits.npy")
    np.testing.assert_array_equal(
        np.load(tmp_path / "out" / "digits.npy"), dae.denoise(digits[..., None], network)[..., 0]
    )
    with np.load(tmp_path / "out" / "set.npz") as arrays, np.load(folder / "set.npz") as sources:
        np.testing.assert_allclose(arrays["x"], dae.denoise(sources["x"], network), atol=1e-6)
        np.testing.assert_array_equal(arrays["y"], sources["y"])
        np.testing.assert_array_equal(arrays["words"], sources["words"])
    assert "copied unchanged: y, words of in/set.npz" in done.stdout
    assert done.stdout.count("the network is grey: it denoises each channel of colour images separately\n") == 1
    assert "skipped other files: 1 .txt" in done.stdout
    assert "in/stack.tif: 5 images, 28 x 28, grey, uint8" in done.stdout
    assert "in/digits.npy: 7 images, 28 x 28, grey, uint8" in done.stdout
    assert "in/set.npz:x: 3 images, 28 x 28, grey, float32" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("denoised 11 of 11 files (")
    again = run_in_process("denoise.py", "--model", model, "in", "--output", "out", cwd=tmp_path, status=2)
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr
    run_in_process("denoise.py", "--model", model, "in", "--output", "out", "--overwrite", cwd=tmp_path)


def test_a_run_uses_its_value_range_unless_another_is_given(tiny_run, tmp_path, mnist):
    shutil.copytree(tiny_run, tmp_path / "run")
    model = tmp_path / "run" / "model.keras"
    save_model(load_model(model), model, ValueRange(0, 4095, "uint16"))
    twelve_bits = np.rint(mnist.test.pixels[:1] / 255 * 4095).astype(np.uint16)
    pictures.write(tmp_path / "a.tif", twelve_bits)
    for flags, expected in (((), (0, 4095)), (("--value-range", 0, 8000), (0, 8000))):
        run_in_process("denoise.py", "--model", "run", "a.tif", "--output", "out", "--overwrite", *flags, cwd=tmp_path)
        denoised = dae.denoise(twelve_bits, tiny_run, value_range=expected)
        np.testing.assert_array_equal(pictures.read(tmp_path / "out" / "a.tif"), denoised)


def test_a_colour_network_says_how_it_denoises_grey_images(tmp_path, mnist):
    pictures.write(tmp_path / "a.png", mnist.test.pixels[:1])
    colour = PRETRAINED / "colour"
    done = run_in_process("denoise.py", "--model", colour, "a.png", "--output", "out", cwd=tmp_path)
    assert "the network is for colour: its outputs for grey images are averaged over the channels" in done.stdout


def test_in_an_npz_file_images_of_any_names_are_denoised_and_the_rest_is_copied(model, tmp_path, mnist):
    digits, labels, masks = mnist.test.pixels[:3], np.eye(10, dtype=np.float32)[:3], np.ones((3, 28, 28), np.int64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in {"x/1": digits, "file": digits, "allow_pickle": labels, "z": masks}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
        archive.writestr("readme.txt", "no array")
    done = run_in_process("denoise.py", "--model", model, "a.npz", "--output", "out", cwd=tmp_path)
    assert "copied unchanged: allow_pickle, z of a.npz" in done.stdout
    with np.load(tmp_path / "out" / "a.npz") as arrays:
        for name in ("x/1", "file"):
            np.testing.assert_array_equal(arrays[name], dae.denoise(digits, dae.load_model(model)))
        np.testing.assert_array_equal(arrays["allow_pickle"], labels)
        np.testing.assert_array_equal(arrays["z"], masks)
    with zipfile.ZipFile(tmp_path / "out" / "a.npz") as archive:
        assert archive.read("readme.txt") == b"no array"


@pytest.mark.slow
def test_names_that_are_no_unicode_are_read_written_and_shown(model, tmp_path, mnist, monkeypatch):
    (tmp_path / "in").mkdir()
    pictures.write(tmp_path / "in" / "\udcff.png", mnist.test.pixels[:1])
    (tmp_path / "in" / "\udcfe.png").write_text("broken")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = run_subprocess("denoise.py", "--model", model, "in", "--output", "out", cwd=tmp_path, status=2)
    assert r"denoised all files but in/\udcfe.png" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["\udcff.png"]


def test_a_write_that_fails_is_reported_in_one_line_and_leaves_nothing(model, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((300, 300), np.uint8))
    with file_size_limit(60_000):
        done = run_in_process("denoise.py", "--model", model, "a.npy", "--output", "out", cwd=tmp_path, status=1)
    assert done.stderr.count("\n") == 1, done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_a_broken_file_does_not_keep_others_from_being_denoised(model, folder, tmp_path):
    (folder / "empty.png").write_bytes(b"")
    cut = folder / "sub" / "2.png"  # whose header is readable
    cut.write_bytes(cut.read_bytes()[:-30])
    values = np.ones((2, 30, 30), np.float32)
    values[1, 3, 4] = np.nan
    np.save(folder / "nan.npy", values)
    done = run_in_process("denoise.py", "--model", model, "in", "--output", "out", cwd=tmp_path, status=2)
    assert done.stderr.count("\n") == 1
    assert "in/empty.png: not readable" in done.stderr
    assert done.stderr.endswith("denoised all files but in/empty.png, in/nan.npy, in/sub/2.png\n")
    assert "denoised 10 of 13 files (" in done.stdout
    written = {path.name for path in (tmp_path / "out").rglob("*.*")}
    names = {path.name for path in folder.rglob("*.*")}
    assert names - written == {"2.png", "empty.png", "nan.npy", "notes.txt", ".hidden.png"}


def test_slices_of_a_volume_are_denoised_one_by_one_along_any_axis(model, tmp_path, mnist):
    slices = mnist.test.pixels[:30, ..., 0] / np.float32(255)
    expected = dae.denoise(slices, dae.load_model(model))
    np.save(tmp_path / "last.npy", np.asfortranarray(slices.transpose(1, 2, 0)))
    np.savez(tmp_path / "set.npz", volume=slices.transpose(1, 2, 0), age=np.arange(3))
    done = run_in_process(
        "denoise.py", "--model", model, "last.npy", "set.npz", "--output", "out", "--axes", "YXZ", cwd=tmp_path
    )
    assert "last.npy, set.npz:volume: each 30 images, 28 x 28, grey, float32" in done.stdout
    np.testing.assert_allclose(np.load(tmp_path / "out" / "last.npy").transpose(2, 0, 1), expected, atol=1e-6)
    with np.load(tmp_path / "out" / "set.npz") as arrays:
        np.testing.assert_allclose(arrays["volume"].transpose(2, 0, 1), expected, atol=1e-6)
    four = slices.reshape(5, 6, 28, 28)
    np.testing.assert_allclose(
        dae.denoise(four, dae.load_model(model), axes="TZYX").reshape(-1, 28, 28), expected, atol=1e-6
    )


def test_hounsfield_units_are_denoised_with_a_value_range(model, tmp_path, mnist):
    hounsfield = (mnist.test.pixels[:5, ..., 0].astype(np.int16) - 128) * 8
    np.savez(tmp_path / "ct.npz", ct=hounsfield)
    done = run_in_process("denoise.py", "--model", model, "ct.npz", "--output", "out", cwd=tmp_path, status=2)
    assert "ct.npz:ct: expected uint8, uint16, or floats" in done.stderr
    assert "got int16; --value-range BLACK WHITE allows other integers" in done.stderr
    done = run_in_process(
        "denoise.py", "--model", model, "ct.npz", "--output", "out", "--value-range", -1024, 1016, cwd=tmp_path
    )
    with np.load(tmp_path / "out" / "ct.npz") as arrays:
        expected = dae.denoise(mnist.test.pixels[:5, ..., 0], dae.load_model(model))
        assert arrays["ct"].dtype == np.int16
        np.testing.assert_allclose(arrays["ct"] / 8 + 128, expected, atol=1)
