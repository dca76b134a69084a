import dataclasses
import os
import shutil
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
from dae.data.pipeline import evaluation_batches, training_batches
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


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "TIFF", "webp", "jpg", "JPEG", "jfif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_formats_are_read_in_grey_and_in_colour(suffix, mode, tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (6, 4, 5, len(mode)), np.uint8) * np.uint8(85)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    for number, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if mode == "L" else image)
        picture.save(tmp_path / f"{number}.{suffix}", lossless=True)  # if it is WebP
    splits = load(tmp_path)
    if suffix == "webp":  # has no grey
        images = np.broadcast_to(images, (*images.shape[:3], 3))
    assert splits.train.image_shape == images.shape[1:]
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


def test_part_of_only_broken_pictures_is_refused(digits, tmp_path):
    (tmp_path / "class 0").rename(tmp_path / "train")
    (tmp_path / "class 1").rename(tmp_path / "test")
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"class {number}")
    for file in (tmp_path / "test").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="all pictures of the part test are broken"):
        load(tmp_path, skip_broken=True)


@pytest.mark.parametrize(
    ("value", "role", "message"),
    [
        (np.nan, "clean", "has values from nan to nan"),
        (np.nan, "noisy", "has noisy values from nan to nan, .*--no-clip-noise allows any finite ones"),
        (1.5, "noisy", "has noisy values from 0.* to 1.5, but black is 0 and white 1"),
    ],
)
def test_float_pictures_of_other_values_than_from_0_to_1_are_refused(value, role, message, tmp_path):
    for each in ("clean", "noisy"):
        (tmp_path / each).mkdir()
        for number in range(4):
            pixels = np.random.default_rng(number).random((16, 16), np.float32)
            if (each, number) == (role, 2):
                pixels[3, 4] = value
            Image.fromarray(pixels).save(tmp_path / each / f"{number}.tif")
    with pytest.raises(UsageError, match=message):
        load(tmp_path)
    if value == 1.5:
        load(tmp_path, clip_noise=False)


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


def save_parts(digits: np.ndarray, tmp_path: Path, **counts: int) -> dict[str, np.ndarray]:
    """Save as many digits as pictures in each folder; return those of each."""
    saved, start = {}, 0
    for folder, count in counts.items():
        saved[folder] = digits[start : start + count]
        for number, image in enumerate(saved[folder]):
            path = tmp_path / folder / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
        start += count
    return saved


@pytest.mark.parametrize(
    ("folders", "train", "validation", "test"),
    [
        (("Training", "Testing"), "Training", None, "Testing"),
        (("train", "val"), "train", "val", None),
        (("train", "val", "test"), "train", "val", "test"),
        (("TRAIN", "Valid", "Test"), "TRAIN", "Valid", "Test"),
        (("trainset", "dev", "testset"), "trainset", "dev", "testset"),
    ],
)
def test_no_test_picture_is_trained_on_and_the_validation_folder_validates(
    folders, train, validation, test, mnist, tmp_path
):
    saved = save_parts(mnist.test.pixels[:60], tmp_path, **{folder: 20 for folder in folders})
    config = RunConfig(data=str(tmp_path), batch_size=4, epochs=2, noise_level=0)
    splits = datasets.load(config)
    trained = np.concatenate([batch.clean for batch in training_batches(splits.train, config).as_numpy_iterator()])
    trained = np.unique(np.rint(trained * 255).astype(np.uint8), axis=0)
    for part, folder in ((splits.validation, validation), (splits.test, test)):
        if folder is not None:
            assert are_same_images(part.pixels, saved[folder])
    others = [part.pixels for part, folder in ((splits.validation, validation), (splits.test, test)) if folder is None]
    assert are_same_images(np.concatenate([trained, *others]), saved[train])
    assert ("the last of those to train on" in splits.notes[1]) == (validation is None)
    assert ("drawn from the others" in splits.notes[2]) == (test is None)


def test_last_pictures_of_a_validation_folder_validate(mnist, tmp_path):
    save_parts(mnist.test.pixels[:60], tmp_path, train=40, val=20)
    whole, part = load(tmp_path), load(tmp_path, validation_examples=5)
    np.testing.assert_array_equal(part.validation.pixels, whole.validation.pixels[-5:])
    np.testing.assert_array_equal(part.train.pixels, whole.train.pixels)
    with pytest.raises(UsageError, match=r"^--validation-examples: 21 exceeds the 20 there are"):
        load(tmp_path, validation_examples=21)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("test",), r"has no part to train on, only test; expected train"),
        (("val", "test"), r"has no part to train on, only .*; expected train"),
        (("train", "test", "more"), r"more/class 0/0\.png is in none of the parts test, train"),
    ],
)
def test_parts_that_are_incomplete_are_refused_in_one_line(folders, message, mnist, tmp_path):
    save_parts(mnist.test.pixels[:60], tmp_path, **{folder: 4 for folder in folders})
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"--data: {tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def deep(mnist, tmp_path) -> np.ndarray:
    """Forty digits of 12 bits, saved as 16-bit PNGs of which the largest value is 4095."""
    noise = np.random.default_rng(0).integers(0, 16, (40, 28, 28), np.uint16)
    images = mnist.test.pixels[:40, ..., 0].astype(np.uint16) * 16 + noise
    images[:, 0, 0] = 4095
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    return images


def clean_values(config: RunConfig) -> np.ndarray:
    """Return the clean images of all batches, float32 [N, H, W, C]."""
    splits = datasets.load(config)
    parts = [
        training_batches(splits.train, config),
        evaluation_batches(splits.validation, config, "validation"),
        evaluation_batches(splits.test, config, "test"),
    ]
    return np.concatenate([batch.clean for part in parts for batch in part.as_numpy_iterator()])


def test_pictures_of_12_bits_need_a_value_range_and_are_then_read_at_full_precision(deep, tmp_path):
    config = RunConfig(data=str(tmp_path), batch_size=8, epochs=1)
    message = "nearly black: the largest value is 4095, but white is 65535; add --value-range 0 4095 if 4095 is white"
    with pytest.raises(UsageError, match=message) as caught:
        datasets.load(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=message):
        datasets.load_test(config)
    values = clean_values(dataclasses.replace(config, value_range=(0, 4095)))
    assert values.max() == 1
    assert are_same_images(values[..., 0], deep.astype(np.float32) / np.float32(4095))
    dark = clean_values(dataclasses.replace(config, value_range=(0, 65535)))
    assert are_same_images(dark[..., 0], deep.astype(np.float32) / np.float32(65535))


def test_values_beyond_the_value_range_are_refused(deep, tmp_path):
    message = r"train has values from \d+ to 4095, but black is 0 and white 1000; --value-range sets others"
    with pytest.raises(UsageError, match=message):
        load(tmp_path, value_range=(0, 1000))
    with pytest.raises(UsageError, match="black is 100 and white 4095"):
        load(tmp_path, value_range=(100, 4095))


def test_pictures_of_8_and_16_bits_together_have_16_bits(digits, tmp_path):
    deep = digits[0].astype(np.uint16) * 257 + 5
    Image.fromarray(deep[..., 0]).save(tmp_path / "deep.png")
    pixels = everything(load(tmp_path))
    assert are_same_images(pixels, np.concatenate([digits.astype(np.uint16) * 257, deep[None]]))
    with pytest.raises(UsageError, match="pictures of uint16 and uint8; expected one type"):
        load(tmp_path, value_range=(0, 255))


def test_grey_converts_pictures_as_pillow_does(tmp_path, mnist):
    coloured = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 3), np.uint8)
    for number, image in enumerate(coloured):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    Image.fromarray(mnist.test.pixels[0, ..., 0]).save(tmp_path / "grey.png")
    expected = [np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in coloured]
    splits = load(tmp_path, grey=True)
    assert splits.train.channels == 1
    assert are_same_images(everything(splits), np.stack([*expected, mnist.test.pixels[0]]))
    assert len(splits.notes) == 3


def test_files_that_are_no_pictures_are_counted_by_suffix_in_a_note(digits, tmp_path):
    for name in ("a.txt", "b.TXT", "class 1/c.txt", "class 2/photo.heic", "README"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    splits = load(tmp_path)
    assert splits.notes[3:] == ("not read, because of their suffixes: 3 .txt, 1 no suffix, 1 .heic",)
    assert are_same_images(everything(splits), digits)


def test_broken_picture_of_a_pair_is_skipped_with_its_partner(digits, tmp_path):
    folder = tmp_path / "pairs"
    for role in ("clean", "noisy"):
        for number, image in enumerate(digits[:10]):
            path = folder / role / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    (folder / "noisy" / "3.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"noisy/3\.png: not readable .*--skip-broken"):
        load(folder)
    splits = load(folder, skip_broken=True)
    assert are_same_images(everything(splits)[..., :1].copy(), np.delete(digits[:10], 3, axis=0))
    assert splits.notes[-1] == "skipped 1 broken pictures: noisy/3.png"


def test_deep_pictures_are_scaled_like_those_of_8_bits(tmp_path):
    rows, columns = np.mgrid[:28, :28]
    smooth = np.stack([100 + 60 * np.sin(rows / (3 + number)) * np.cos(columns / 4) for number in range(8)])
    for folder, dtype, scale in (("8 bits", np.uint8, 1), ("16 bits", np.uint16, 257)):
        for number, image in enumerate(smooth):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.rint(image * scale).astype(dtype)).save(path)
    shallow, deep = (load(tmp_path / folder, image_size=(20, 24)) for folder in ("8 bits", "16 bits"))
    assert (shallow.train.pixels.dtype, deep.train.pixels.dtype) == (np.uint8, np.uint16)
    assert deep.train.image_shape == (20, 24, 1)
    np.testing.assert_allclose(everything(deep) / 257, everything(shallow), atol=1.5)
    assert len(np.unique(everything(deep))) > 256


def save_sizes(folder: Path, digits: np.ndarray, dtype: type = np.uint8) -> list[np.ndarray]:
    """Save digits as pictures of several sizes: between 1 and 2 digits high and wide."""
    scale = 257 if dtype == np.uint16 else 1
    rng, pictures = np.random.default_rng(0), []
    for number, image in enumerate(digits):
        height, width = rng.integers(28, 57, 2)
        pictures.append(np.tile(image[..., 0].astype(dtype) * dtype(scale), (2, 2))[:height, :width])
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[-1]).save(path)
    return pictures


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_of_several_sizes_are_kept_whole_with_patch_size(dtype, digits, tmp_path):
    pictures = save_sizes(tmp_path / "sizes", digits[:20], dtype)
    with pytest.raises(UsageError, match=r"pictures of \d+ sizes, .*add --image-size .*, or --patch-size"):
        load(tmp_path / "sizes")
    splits = load(tmp_path / "sizes", patch_size=16)
    assert " x " in splits.notes[0]
    assert " to " in splits.notes[0]
    patches = sum(max(1, size[0] * size[1] // 16**2) for size in splits.train.shapes)
    assert splits.notes[0].endswith(f"; an epoch has {patches} patches of 16 x 16")
    found = [
        batch.clean[0, ..., 0]
        for part in (splits.train, splits.validation, splits.test)
        for batch in evaluation_batches(part, RunConfig(), "test").as_numpy_iterator()
    ]
    expected = [picture / np.float32(np.iinfo(dtype).max) for picture in pictures]
    assert sorted((one.shape, one.tobytes()) for one in found) == sorted((one.shape, one.tobytes()) for one in expected)


def test_training_pictures_smaller_than_a_patch_are_refused(digits, tmp_path):
    save_sizes(tmp_path / "sizes", digits[:20])
    with pytest.raises(
        UsageError,
        match=r"^--patch-size: 29 exceeds the size of an image of --data: .*, (\d\d x 28|28 x \d\d); expected .* 28$",
    ):
        load(tmp_path / "sizes", patch_size=29)


def test_patch_size_for_small_pictures_names_the_picture(digits, tmp_path):
    Image.new("L", (40, 8)).save(tmp_path / "small.png")
    with pytest.raises(UsageError, match=r"small\.png: .*H and W >= 11"):
        load(tmp_path, patch_size=11)
