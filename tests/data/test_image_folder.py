import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dae.config import RunConfig
from dae.data import datasets
from dae.errors import UsageError


def load(folder: Path, **settings) -> datasets.Splits:
    return datasets.load(RunConfig(data=str(folder), batch_size=1, **settings))


def everything(splits: datasets.Splits) -> np.ndarray:
    return np.concatenate([splits.train, splits.validation, splits.test])


def same_images(images: np.ndarray, others: np.ndarray) -> bool:
    return sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in others)


@pytest.fixture
def digits(mnist, tmp_path) -> np.ndarray:
    """Forty digits, which are also pictures in nested folders of tmp_path, by kind."""
    images = mnist.test[:40]
    for number, image in enumerate(images):
        path = tmp_path / f"kind {number // 10}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return images


def test_every_picture_of_nested_folders_is_read_in_an_order_of_its_own(digits, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (33, 3, 4)
    assert same_images(everything(splits), digits)
    np.testing.assert_array_equal(everything(load(tmp_path, seed=7)), everything(splits))
    # Not the last kind alone validates, as it would in the order of names.
    assert not same_images(splits.validation, digits[-3:])
    assert splits.notes == ("no test part: 4 of 40 images, drawn by a fixed seed, make one",)


def test_the_folders_train_and_test_are_the_parts(digits, tmp_path):
    (tmp_path / "kind 0").rename(tmp_path / "test")
    (tmp_path / "kind 1").rename(tmp_path / "train")
    splits = load(tmp_path)
    assert same_images(splits.test, digits[:10])
    assert same_images(np.concatenate([splits.train, splits.validation]), digits[10:20])
    assert splits.notes == ()


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "jpg", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_format_in_grey_and_in_colour(suffix, mode, tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (6, 4, 5, len(mode)), np.uint8) * np.uint8(85)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if mode == "L" else image).save(tmp_path / f"{number}.{suffix}")
    splits = load(tmp_path)
    assert splits.image_shape == (32, 40, len(mode))
    if suffix.startswith(("j", "J")):
        sums = everything(splits).astype(int).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(sorted(sums), sorted(images.astype(int).sum(axis=(1, 2, 3))), rtol=0.02)
    else:
        assert same_images(everything(splits), images)


def one_picture(tmp_path: Path, image: Image.Image, suffix: str = "png", **saving) -> np.ndarray:
    """The pixels of a picture as they are read."""
    folder = tmp_path / "one"
    folder.mkdir()
    for number in range(2):
        image.save(folder / f"{number}.{suffix}", **saving)
    return load(folder).train[0]


def test_16_bits_are_cut_to_8(tmp_path):
    deep = np.arange(400, dtype=np.uint16).reshape(20, 20) * 164
    pixels = one_picture(tmp_path, Image.fromarray(deep))
    np.testing.assert_array_equal(pixels[..., 0], np.rint(deep / 257))


def test_what_is_transparent_is_white(tmp_path):
    image = np.zeros((20, 20, 4), np.uint8)
    image[:10] = (255, 0, 0, 255)
    pixels = one_picture(tmp_path, Image.fromarray(image))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[-1, -1].tolist() == [255, 255, 255]


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((20, 20), value, np.uint8)) for value in (40, 90, 200)]
    pixels = one_picture(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (pixels == 40).all()


def test_a_photo_is_turned_as_its_camera_was(tmp_path):
    upright = np.zeros((48, 16), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter to the right to see it upright
    lying = Image.fromarray(np.rot90(upright))
    pixels = one_picture(tmp_path, lying, "jpg", exif=exif)
    assert pixels.shape == (48, 16, 1)
    np.testing.assert_allclose(pixels[..., 0], upright, atol=20)


def test_pictures_of_several_sizes_need_image_size_which_cuts_to_the_middle(tmp_path):
    for number, (width, height) in enumerate([(60, 30), (40, 80), (500, 500), (20, 20)]):
        image = np.zeros((height, width, 3), np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = (200, 100, 50)
        Image.fromarray(image).save(tmp_path / f"{number}.jpg", quality=95)
    with pytest.raises(UsageError, match=r"of 4 sizes, from 20 x 20 .3.jpg. to 500 x 500 .2.jpg.; add --image-size"):
        load(tmp_path)
    splits = load(tmp_path, image_size=24)
    assert splits.image_shape == (24, 24, 3)
    assert splits.notes[0] == "pictures scaled to cover 24 x 24 (height x width), and cut to their middle"
    np.testing.assert_allclose(everything(splits)[:, 2:-2, 2:-2], np.full((4, 20, 20, 3), (200, 100, 50)), atol=8)
    assert load(tmp_path, image_size=(16, 32)).image_shape == (16, 32, 3)


def test_grey_among_colour_is_colour_and_said(digits, tmp_path):
    Image.fromarray(np.full((28, 28, 3), (9, 99, 199), np.uint8)).save(tmp_path / "colour.png")
    splits = load(tmp_path)
    assert splits.image_shape == (28, 28, 3)
    assert "grey pictures among coloured ones are shown in colour" in splits.notes


def test_a_broken_picture_is_named_and_left_out_only_on_request(digits, tmp_path):
    cut, empty = tmp_path / "kind 1" / "10.png", tmp_path / "kind 2" / "20.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"kind 1/10.png: broken .* or leave out all such by --skip-broken"):
        load(tmp_path)
    empty.write_bytes(b"")
    splits = load(tmp_path, skip_broken=True)
    assert same_images(everything(splits), np.delete(digits, [10, 20], axis=0))
    assert "broken pictures left out: kind 1/10.png, kind 2/20.png" in splits.notes


def test_nothing_but_broken_pictures_and_too_small_ones_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UsageError, match="all its pictures are broken"):
        load(tmp_path, skip_broken=True)
    Image.new("L", (40, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="H and W from 11"):
        load(tmp_path)


@fuzz
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "bmp", "gif"]))
def test_any_damage_to_a_picture_is_refused_in_one_line_or_leaves_images(tmp_path_factory, mnist, data, suffix):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-pictures"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        os.unlink(old)
    for number in range(2):
        Image.fromarray(mnist.test[number, ..., 0]).save(folder / f"{number}.{suffix}")
    content = bytearray((folder / f"1.{suffix}").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / f"1.{suffix}").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of odd but readable files
            splits = load(folder)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert splits.train.dtype == np.uint8
