import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dae.config import RunConfig
from dae.data import datasets
from dae.errors import UsageError


def load(folder: Path, **settings) -> datasets.Splits:
    return datasets.load(RunConfig(data=str(folder), batch_size=1, **settings))


def everything(splits: datasets.Splits) -> np.ndarray:
    return np.concatenate([part.pixels for part in (splits.train, splits.validation, splits.test)])


def are_same_images(images: np.ndarray, others: np.ndarray) -> bool:
    return sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in others)


@pytest.fixture
def digits(mnist, tmp_path) -> np.ndarray:
    """Forty digits, saved as pictures in four folders of tmp_path, sorted by class."""
    images = mnist.test.pixels[:40]
    for number, image in enumerate(images):
        path = tmp_path / f"class {number // 10}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return images


def test_pictures_in_nested_folders_are_read_and_shuffled_by_a_fixed_seed(digits, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (33, 3, 4)
    assert are_same_images(everything(splits), digits)
    np.testing.assert_array_equal(everything(load(tmp_path, seed=7)), everything(splits))
    # In the order of names, only the last class would validate.
    assert not are_same_images(splits.validation.pixels, digits[-3:])
    assert splits.notes[2:] == (
        "test: 4 images, 28 x 28, grey, uint8 from 0 to 255, drawn from the others by a fixed seed",
        "not read, because of their suffixes: 1 .txt",
    )


def test_folders_train_and_test_are_the_two_parts(digits, tmp_path):
    (tmp_path / "class 0").rename(tmp_path / "test")
    (tmp_path / "class 1").rename(tmp_path / "train")
    with pytest.raises(UsageError, match=r"class 2/20\.png is in none of the parts test, train, .*move or remove it"):
        load(tmp_path)
    for name in ("class 2", "class 3"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    splits = load(tmp_path)
    assert are_same_images(splits.test.pixels, digits[:10])
    assert are_same_images(np.concatenate([splits.train.pixels, splits.validation.pixels]), digits[10:])
    assert len(splits.notes) == 3


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "jpg", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_formats_are_read_in_grey_and_in_colour(suffix, mode, tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (6, 4, 5, len(mode)), np.uint8) * np.uint8(85)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if mode == "L" else image).save(tmp_path / f"{number}.{suffix}")
    splits = load(tmp_path)
    assert splits.train.image_shape == (32, 40, len(mode))
    if suffix.startswith(("j", "J")):
        sums = everything(splits).astype(int).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(sorted(sums), sorted(images.astype(int).sum(axis=(1, 2, 3))), rtol=0.02)
    else:
        assert are_same_images(everything(splits), images)


def saved_and_loaded(tmp_path: Path, image: Image.Image, suffix: str = "png", **options) -> np.ndarray:
    """Return the pixels of a picture after it was saved and loaded."""
    folder = tmp_path / "one"
    folder.mkdir()
    for number in range(2):
        image.save(folder / f"{number}.{suffix}", **options)
    return load(folder).train.pixels[0]


def test_16_bit_pictures_keep_their_values(tmp_path):
    deep = np.arange(400, dtype=np.uint16).reshape(20, 20) * 164
    pixels = saved_and_loaded(tmp_path, Image.fromarray(deep))
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels[..., 0], deep)


def test_transparent_pixels_become_white(tmp_path):
    image = np.zeros((20, 20, 4), np.uint8)
    image[:10] = (255, 0, 0, 255)
    pixels = saved_and_loaded(tmp_path, Image.fromarray(image))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[-1, -1].tolist() == [255, 255, 255]


def test_only_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((20, 20), value, np.uint8)) for value in (140, 90, 200)]
    pixels = saved_and_loaded(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (pixels == 140).all()


def test_photo_is_rotated_as_its_exif_says(tmp_path):
    upright = np.zeros((48, 16), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    rotated = Image.fromarray(np.rot90(upright))
    pixels = saved_and_loaded(tmp_path, rotated, "jpg", exif=exif)
    assert pixels.shape == (48, 16, 1)
    np.testing.assert_allclose(pixels[..., 0], upright, atol=20)


def test_pictures_of_several_sizes_need_image_size_and_are_cropped_to_the_centre(tmp_path):
    for number, (width, height) in enumerate([(60, 30), (40, 80), (500, 500), (20, 20)]):
        image = np.zeros((height, width, 3), np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = (200, 100, 50)
        Image.fromarray(image).save(tmp_path / f"{number}.jpg", quality=95)
    with pytest.raises(UsageError, match=r"4 sizes, .*20 x 20 \(3\.jpg\).*500 x 500 \(2\.jpg\).*--image-size"):
        load(tmp_path)
    splits = load(tmp_path, image_size=24)
    assert splits.train.image_shape == (24, 24, 3)
    assert "cover 24 x 24" in splits.notes[-1]
    np.testing.assert_allclose(everything(splits)[:, 2:-2, 2:-2], np.full((4, 20, 20, 3), (200, 100, 50)), atol=8)
    assert load(tmp_path, image_size=(16, 32)).train.image_shape == (16, 32, 3)


def test_grey_pictures_among_coloured_ones_become_colour_with_a_note(digits, tmp_path):
    Image.fromarray(np.full((28, 28, 3), (9, 99, 199), np.uint8)).save(tmp_path / "colour.png")
    splits = load(tmp_path)
    assert splits.train.image_shape == (28, 28, 3)
    assert any("grey pictures" in note and "colour" in note for note in splits.notes)
    grey = [image[..., :1] for image in everything(splits) if (image == image[..., :1]).all()]
    assert are_same_images(np.array(grey), digits)


def test_broken_picture_is_refused_or_skipped_with_skip_broken(digits, tmp_path):
    cut, empty = tmp_path / "class 1" / "10.png", tmp_path / "class 2" / "20.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"class 1/10\.png: not readable .*--skip-broken"):
        load(tmp_path)
    empty.write_bytes(b"")
    splits = load(tmp_path, skip_broken=True)
    assert are_same_images(everything(splits), np.delete(digits, [10, 20], axis=0))
    assert any("broken" in note and "class 1/10.png, class 2/20.png" in note for note in splits.notes)


def test_folder_of_only_broken_or_too_small_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UsageError, match="all pictures are broken"):
        load(tmp_path, skip_broken=True)
    Image.new("L", (40, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="H and W >= 11"):
        load(tmp_path)


@fuzz
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "bmp", "gif"]))
def test_randomly_damaged_picture_loads_or_is_refused_in_one_line(tmp_path_factory, mnist, data, suffix):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-pictures"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        os.unlink(old)
    for number in range(2):
        Image.fromarray(mnist.test.pixels[number, ..., 0]).save(folder / f"{number}.{suffix}")
    content = bytearray((folder / f"1.{suffix}").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / f"1.{suffix}").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd but readable files
            splits = load(folder)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert splits.train.pixels.dtype == np.uint8
