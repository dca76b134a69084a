from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dae.config import RunConfig
from dae.data import datasets, pictures
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import UsageError


def load(folder: Path, **settings) -> datasets.Splits:
    return datasets.load(RunConfig(data=str(folder), batch_size=1, **settings))


def everything(splits: datasets.Splits) -> np.ndarray:
    return np.concatenate([split.pixels for split in (splits.train, splits.validation, splits.test)])


def are_same_images(images: np.ndarray, others: np.ndarray) -> bool:
    return sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in others)


def save(folder: Path, pictures: Iterable[np.ndarray], suffix: str = "png") -> None:
    """Save pictures [H, W] or [H, W, C] under their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(folder / f"{number}.{suffix}")


@pytest.fixture
def digits(mnist, tmp_path) -> np.ndarray:
    """Forty digits, saved as pictures in four folders of tmp_path, sorted by class."""
    images = mnist.test.pixels[:40]
    for number, suffix in enumerate(("png", "png", "gif", "TIFF")):
        save(tmp_path / f"class {number}", images[10 * number : 10 * number + 10], suffix)
    return images


def test_pictures_in_nested_folders_are_read_and_shuffled_by_a_fixed_seed(digits, tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.TXT", "class 1/photo.heic", "README", ".hidden.png", ".git/config.txt"):
        (tmp_path / name).write_text("no picture")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (33, 3, 4)
    assert are_same_images(everything(splits), digits)
    np.testing.assert_array_equal(everything(load(tmp_path, seed=7)), everything(splits))
    # In the order of names, only the last class would validate.
    assert not are_same_images(splits.validation.pixels, digits[-3:])
    assert splits.notes[2:] == (
        "test: 4 images, 28 x 28, grey, uint8 from 0 to 255, drawn from the others by a fixed seed",
        "not read, because of their suffixes: 2 .txt, 1 no suffix, 1 .heic",
    )


def test_pictures_of_several_sizes_need_image_size_and_are_cropped_to_the_centre(tmp_path):
    for number, (width, height) in enumerate([(60, 30), (40, 80), (500, 500), (20, 20)]):
        image = np.zeros((height, width, 3), np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = (200, 100, 50)
        Image.fromarray(image).save(tmp_path / f"{number}.jpg", quality=95)
    with pytest.raises(UsageError, match=r"4 sizes, such as 3\.jpg and 2\.jpg; .*--image-size"):
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


def test_a_folder_or_split_of_only_broken_pictures_and_too_small_ones_are_rejected(mnist, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(b"")
    with pytest.raises(UsageError, match="all pictures are broken"):
        load(tmp_path, skip_broken=True)
    save(tmp_path / "train", mnist.test.pixels[:10])
    with pytest.raises(UsageError, match="all pictures of the split test are broken"):
        load(tmp_path, skip_broken=True)
    for name, height in (("0", 8), ("1", 40)):
        Image.new("L", (40, height)).save(tmp_path / "test" / f"{name}.png")
    with pytest.raises(UsageError, match=r"0\.png: .*at least 11 x 11"):
        load(tmp_path, patch_size=11)


def save_splits(digits: np.ndarray, tmp_path: Path, **counts: int) -> dict[str, np.ndarray]:
    """Save as many digits as pictures in each folder, below a folder of their class; return those of each."""
    saved, start = {}, 0
    for folder, count in counts.items():
        saved[folder] = digits[start : start + count]
        save(tmp_path / folder / "class 0", saved[folder])
        start += count
    return saved


@pytest.mark.parametrize(
    ("folders", "train", "validation", "test"),
    [
        (("Training", "Testing"), "Training", None, "Testing"),
        (("train", "val"), "train", "val", None),
        (("trainset", "dev", "testset"), "trainset", "dev", "testset"),
    ],
)
def test_no_test_picture_is_trained_on_and_the_validation_folder_validates(
    folders, train, validation, test, mnist, tmp_path
):
    saved = save_splits(mnist.test.pixels[:60], tmp_path, **{folder: 20 for folder in folders})
    config = RunConfig(data=str(tmp_path), batch_size=4, epochs=2, noise_level=0)
    splits = datasets.load(config)
    trained = np.concatenate([batch.clean for batch in training_batches(splits.train, config).as_numpy_iterator()])
    trained = np.unique(np.rint(trained * 255).astype(np.uint8), axis=0)
    drawn = []
    for images, folder in ((splits.validation, validation), (splits.test, test)):
        if folder is None:
            drawn.append(images.pixels)
        else:
            assert are_same_images(images.pixels, saved[folder])
    assert are_same_images(np.concatenate([trained, *drawn]), saved[train])
    assert ("the last of those to train on" in splits.notes[1]) == (validation is None)
    assert ("drawn from the others" in splits.notes[2]) == (test is None)


def test_last_pictures_of_a_validation_folder_validate(mnist, tmp_path):
    save_splits(mnist.test.pixels[:60], tmp_path, train=40, val=20)
    whole, few = load(tmp_path), load(tmp_path, validation_examples=5)
    np.testing.assert_array_equal(few.validation.pixels, whole.validation.pixels[-5:])
    np.testing.assert_array_equal(few.train.pixels, whole.train.pixels)
    with pytest.raises(UsageError, match=r"^--validation-examples: 21 exceeds the 20 images available"):
        load(tmp_path, validation_examples=21)


def test_pictures_of_8_and_16_bits_together_are_rejected(digits, tmp_path):
    Image.fromarray(digits[0, ..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match="pictures of uint16 and uint8; expected one type"):
        load(tmp_path)


def test_grey_converts_pictures_as_pillow_does(tmp_path, mnist):
    coloured = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 3), np.uint8)
    save(tmp_path, coloured)
    Image.fromarray(mnist.test.pixels[0, ..., 0]).save(tmp_path / "grey.png")
    expected = [np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in coloured]
    splits = load(tmp_path, grey=True)
    assert splits.train.channels == 1
    assert are_same_images(everything(splits), np.stack([*expected, mnist.test.pixels[0]]))
    assert len(splits.notes) == 3


def test_broken_pictures_are_rejected_or_skipped_with_their_partners(digits, tmp_path):
    folder = tmp_path / "pairs"
    for role in ("clean", "noisy"):
        save(folder / role, digits[:10])
    cut = folder / "clean" / "1.png"  # whose header is readable
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"clean/1\.png: not readable .*--skip-broken"):
        load(folder)
    (folder / "noisy" / "3.png").write_bytes(b"")
    splits = load(folder, skip_broken=True)
    assert are_same_images(everything(splits)[..., :1].copy(), np.delete(digits[:10], [1, 3], axis=0))
    assert splits.notes[-1] == "skipped 2 broken pictures: clean/1.png, noisy/3.png"


@pytest.mark.parametrize("changed", [np.full((28, 28), 300, np.uint16), np.zeros((28, 1), np.uint8)])
def test_a_picture_that_changes_between_its_header_and_its_pixels_is_rejected(changed, digits, tmp_path, monkeypatch):
    read = pictures.read

    def read_after_change(path: Path, at_least: tuple[int, int] | None) -> np.ndarray:
        if path.name == "3.png":  # which several threads do not write at once
            Image.fromarray(changed).save(path)
        return read(path, at_least)

    monkeypatch.setattr(pictures, "read", read_after_change)
    with pytest.raises(UsageError, match=r"3\.png: not readable \(changed while it was read\); repair or remove it"):
        load(tmp_path)


def test_deep_pictures_are_scaled_like_those_of_8_bits(tmp_path):
    rows, columns = np.mgrid[:28, :28]
    smooth = np.stack([100 + 60 * np.sin(rows / (3 + number)) * np.cos(columns / 4) for number in range(8)])
    for folder, dtype, scale in (("8 bits", np.uint8, 1), ("16 bits", np.uint16, 257)):
        save(tmp_path / folder, np.rint(smooth * scale).astype(dtype))
    shallow, deep = (load(tmp_path / folder, image_size=(20, 24)) for folder in ("8 bits", "16 bits"))
    assert (shallow.train.pixels.dtype, deep.train.pixels.dtype) == (np.uint8, np.uint16)
    assert deep.train.image_shape == (20, 24, 1)
    np.testing.assert_allclose(everything(deep) / 257, everything(shallow), atol=1.5)
    assert len(np.unique(everything(deep))) > 256


def contents(image: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return image.shape, image.tobytes()


def test_pictures_of_several_sizes_are_kept_whole_with_patch_size(digits, tmp_path):
    sizes = np.random.default_rng(0).integers(28, 57, (20, 2))
    tiled = (np.tile(image[..., 0], (2, 2)) for image in digits[:20])
    saved = [image[:height, :width] for image, (height, width) in zip(tiled, sizes, strict=True)]
    save(tmp_path / "sizes", saved)
    splits = load(tmp_path / "sizes", patch_size=16)
    assert " x " in splits.notes[0]
    assert " to " in splits.notes[0]
    patches = sum(max(1, size[0] * size[1] // 16**2) for size in splits.train.shapes)
    assert splits.notes[0].endswith(f"; an epoch has {patches} patches of 16 x 16")
    found = [
        batch.clean[0, ..., 0]
        for images in (splits.train, splits.validation, splits.test)
        for batch in evaluation_batches(images, RunConfig(), "test").as_numpy_iterator()
    ]
    expected = [picture / np.float32(255) for picture in saved]
    assert sorted(map(contents, found)) == sorted(map(contents, expected))


def test_pages_of_a_stack_are_images(mnist, tmp_path):
    pages = mnist.test.pixels[:20]
    tifffile.imwrite(tmp_path / "a.tif", pages[..., 0])
    splits = load(tmp_path)
    assert are_same_images(everything(splits), pages)
    assert splits.notes[0].startswith("train: 17 images, 28 x 28, grey")
    Image.fromarray(mnist.test.pixels[20, ..., 0]).save(tmp_path / "b.gif")
    assert are_same_images(everything(load(tmp_path)), mnist.test.pixels[:21])
    assert are_same_images(everything(load(tmp_path, image_size=28)), mnist.test.pixels[:21])


def test_pages_of_stacks_in_folders_named_as_by_care_are_pairs(mnist, tmp_path):
    for folder, images in (("low", mnist.test.pixels[:12]), ("GT", mnist.test.pixels[12:24])):
        (tmp_path / folder).mkdir()
        for number in range(3):
            tifffile.imwrite(
                tmp_path / folder / f"{number}.tif",
                images[4 * number : 4 * number + 4, ..., 0],
                photometric="minisblack",
            )
    splits = load(tmp_path)
    assert splits.notes[0].startswith("train: 10 pairs")
    assert splits.notes[-1] == "train pairs: low/0.tif is noisy, GT/0.tif is clean"
    pairs = np.concatenate([mnist.test.pixels[12:24], mnist.test.pixels[:12]], axis=3)
    assert are_same_images(everything(splits), pairs)
    tifffile.imwrite(tmp_path / "low" / "2.tif", mnist.test.pixels[:5, ..., 0])
    with pytest.raises(UsageError, match=r"GT/2\.tif and .*low/2\.tif: .* equal sizes and numbers of pages"):
        load(tmp_path)


def test_noisy_and_clean_state_the_roles_of_folders(mnist, tmp_path):
    for folder, start in (("before", 0), ("after", 10)):
        save(tmp_path / folder / "train", mnist.test.pixels[start : start + 5])
        save(tmp_path / folder / "test", mnist.test.pixels[start + 5 : start + 10])
    with pytest.raises(UsageError, match=r"after/test is named like a split"):
        load(tmp_path)
    splits = datasets.load(RunConfig(noisy=str(tmp_path / "before"), clean=str(tmp_path / "after")))
    pairs = np.concatenate([mnist.test.pixels[10:20], mnist.test.pixels[:10]], axis=3)
    assert are_same_images(splits.test.pixels, pairs[5:])
    assert "test pairs: before/test/0.png is noisy, after/test/0.png is clean" in splits.notes
    save(tmp_path / "a noisy street", mnist.test.pixels[:10])
    assert not datasets.load(RunConfig(clean=str(tmp_path / "a noisy street"))).train.is_paired
