"""Tests of images of several sizes and types, and of pairs from their files to the batches."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import rejected
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import config_of

from dae.config import PYTHON_DATA, RunConfig
from dae.data import datasets, images, storage
from dae.data.images import Images
from dae.data.noise import NOISES
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import UsageError
from dae.seeding import stateless_seed
from dae.training.task import prepare

Pairs = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def pairs(mnist) -> Pairs:
    """Forty digits, clean and noisy, uint8 [40, 28, 28]."""
    clean = mnist.test.pixels[:40, ..., 0]
    noise = np.random.default_rng(0).normal(0, 50, clean.shape)
    return clean, np.rint(clean + noise).clip(0, 255).astype(np.uint8)


def check_pairs(splits: datasets.Splits, config: RunConfig, clean: np.ndarray, noisy: np.ndarray) -> None:
    """Assert that in all batches each clean image stands beside its noisy partner, with no noise added."""
    partners = {image.tobytes(): partner for image, partner in zip(clean, noisy, strict=True)}
    seen = []
    for batches in (
        training_batches(splits.train, config),
        evaluation_batches(splits.validation, config, "validation"),
        evaluation_batches(splits.test, config, "test"),
    ):
        for batch in batches.as_numpy_iterator():
            np.testing.assert_array_equal(batch.noise_level, 0)
            for image, noisy_image in zip(batch.clean, batch.noisy, strict=True):
                np.testing.assert_array_equal(noisy_image[..., 0], partners[image[..., 0].tobytes()])
                seen.append(image.tobytes())
    assert sorted(seen) == sorted(partners)


def save_pictures(folder: Path, pictures: np.ndarray, name: str = "{}.png") -> None:
    for number, pixels in enumerate(pictures):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def in_two_folders(folder: Path, clean: np.ndarray, noisy: np.ndarray) -> str:
    save_pictures(folder / "clean", clean, "{}.tif")
    save_pictures(folder / "noisy", noisy, "{}.tif")
    return str(folder)


def in_one_folder(folder: Path, clean: np.ndarray, noisy: np.ndarray) -> str:
    save_pictures(folder, clean)
    save_pictures(folder, noisy, "{}_noisy.png")
    return str(folder)


def in_npz(*names: str) -> Callable[[Path, np.ndarray, np.ndarray], str]:
    """Save noisy and clean images as two arrays of these names, or as four, the last two for testing."""

    def save(folder: Path, clean: np.ndarray, noisy: np.ndarray) -> str:
        arrays = [noisy, clean] if len(names) == 2 else [noisy[:30], clean[:30], noisy[30:], clean[30:]]
        named: dict[str, Any] = dict(zip(names, arrays, strict=True))
        np.savez(folder / "own.npz", **named)
        return str(folder / "own.npz")

    return save


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(in_two_folders, id="folders"),
        pytest.param(in_one_folder, id="files"),
        pytest.param(in_npz("x", "y"), id="x and y"),
        pytest.param(in_npz("x_train", "y_train", "x_test", "y_test"), id="x and y of two splits"),
        pytest.param(in_npz("x_train_noisy", "x_train", "x_test_noisy", "x_test"), id="noisy beside x"),
        pytest.param(in_npz("y_noisy", "x_clean"), id="words rather than x and y"),
    ],
)
def test_noisy_images_are_the_input_and_clean_ones_the_target_in_all_batches(save, pairs, tmp_path):
    config = RunConfig(data=save(tmp_path, *pairs), batch_size=8, epochs=1)
    splits = datasets.load(config)
    assert "pairs of noisy and clean images" in splits.notes[0]
    clean, noisy = (images / np.float32(255) for images in pairs)
    check_pairs(splits, config, clean, noisy)


@pytest.mark.parametrize("save", [in_npz("noisy", "clean"), in_two_folders])
def test_pairs_of_floats_keep_their_values_and_noisy_ones_can_leave_the_range(save, pairs, tmp_path):
    clean = (pairs[0] / 255).astype(np.float32)
    noisy = clean + np.random.default_rng(0).normal(0, 0.3, clean.shape).astype(np.float32)
    config = RunConfig(data=save(tmp_path, clean, noisy), batch_size=8, epochs=1)
    with pytest.raises(UsageError, match=r"noisy values from .*; --value-range .*--no-clip-noise"):
        datasets.load(config)
    config = dataclasses.replace(config, clip_noise=False)
    check_pairs(datasets.load(config), config, clean, noisy)
    noisy[2, 3, 4] = np.nan
    save(tmp_path, clean, noisy)
    with pytest.raises(UsageError, match="has noisy values from nan to nan"):
        datasets.load(config)


def test_labels_beside_the_images_are_ignored_with_a_note(pairs, tmp_path):
    clean, _ = pairs
    labels = {"y_train": np.arange(30), "captions": np.array(["a", "b"]), "mean": clean.mean(axis=0)}
    np.savez(tmp_path / "own.npz", x_train=clean[:30], x_test=clean[30:], **labels)
    splits = datasets.load(RunConfig(data=str(tmp_path / "own.npz"), batch_size=8))
    assert not splits.train.is_paired
    assert splits.notes[3:] == (
        "not read: y_train, of shape (30,)",
        "not read: captions, of shape (2,)",
        "not read: mean, of shape (28, 28)",
    )


def test_noise_of_a_given_level_is_added_to_the_noisy_images_of_pairs(pairs, tmp_path):
    config = RunConfig(data=in_two_folders(tmp_path, *pairs), batch_size=8, epochs=1, clip_noise=False)
    train = datasets.load(config).train
    stored, noisier = (
        list(training_batches(train, replaced).as_numpy_iterator())
        for replaced in (config, dataclasses.replace(config, noise_level=0.1))
    )
    for number, (before, after) in enumerate(zip(stored, noisier, strict=True)):
        added = NOISES["gaussian"](before.noisy, 0.1, stateless_seed(0, "noise", number))
        np.testing.assert_allclose(after.noisy, added, atol=1e-6)


def levels(denoised, *, noise_level):
    return noise_level[:, 0, 0, 0]


def test_metrics_that_ask_for_the_noise_that_is_added_are_rejected_for_pairs(files):
    with pytest.raises(UsageError, match=r"^--metrics: levels takes `noise_level`, of noise that is added"):
        prepare(config_of(files, "pairs", metrics=(levels,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clean, noisy: {"noisy": noisy[:-1], "clean": clean}, r"equal shapes .*\(40, 28, .*\(39, 28"),
        (lambda clean, noisy: {"noisy": noisy[:, :20, :20], "clean": clean}, r"equal shapes .*\(40, 28, .*\(40, 20"),
        (lambda clean, noisy: {"noisy": noisy / 255, "clean": clean}, r"equal .*types, got .*uint8 and .*float32"),
        (lambda clean, noisy: {"noisy": noisy}, r"noisy is noisy by its name; expected a clean image for each"),
        (lambda clean, noisy: {"noisy": noisy, "input": noisy, "clean": clean}, r"noisy and input have the same"),
        (lambda clean, noisy: {"noisy_train": noisy, "clean_train": clean, "clean_test": clean}, "clean_test"),
        (lambda clean, noisy: {"a": noisy, "b": clean}, r"one array of images, or several .* got a, b"),
    ],
)
def test_arrays_that_are_no_pairs_are_rejected_in_one_line(change, message, pairs, tmp_path):
    np.savez(tmp_path / "own.npz", **change(*pairs))
    with rejected(f"--data: {tmp_path}/own.npz: ", match=message):
        datasets.load(RunConfig(data=str(tmp_path / "own.npz")))


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)
DTYPES = st.sampled_from([np.uint8, np.uint16, np.float32])


def as_list(images_of_sizes: Images) -> list[np.ndarray]:
    ends = np.cumsum(images_of_sizes.shapes.prod(axis=1))
    blocks = np.split(images_of_sizes.rows, ends[:-1])
    return [block.reshape(*shape, -1) for block, shape in zip(blocks, images_of_sizes.shapes, strict=True)]


@given(st.data(), SHAPES, DTYPES, st.sampled_from([1, 3]))
def test_slices_and_selections_of_images_are_those_of_a_list(data, shapes, dtype, channels):
    rng, largest = np.random.default_rng(0), 1 if dtype == np.float32 else 200
    arrays = [(rng.random((*shape, channels)) * largest).astype(dtype) for shape in shapes]
    of_sizes = Images(
        np.concatenate([array.reshape(-1, channels) for array in arrays]), sizes=np.array(shapes, np.int64)
    )
    if data.draw(st.booleans()):
        numbers = np.arange(len(arrays), dtype=dtype)[:, None, None, None]
        of_sizes = Images(np.repeat(arrays[0][None], len(arrays), axis=0) + numbers)
        arrays = list(of_sizes.pixels)
    start, stop = (data.draw(st.none() | st.integers(-10, 10)) for _ in range(2))
    expected = arrays[start:stop]
    selected = of_sizes[start:stop]
    assert len(selected) == len(expected)
    if expected:
        for image, array in zip(as_list(selected), expected, strict=True):
            np.testing.assert_array_equal(image, array, strict=True)
    indices = np.array(data.draw(st.lists(st.integers(0, len(arrays) - 1), min_size=1, max_size=10)))
    for image, index in zip(as_list(of_sizes.take(indices)), indices, strict=True):
        np.testing.assert_array_equal(image, arrays[index], strict=True)


@given(DTYPES, st.integers(0, 2**16 - 1), st.data())
def test_grey_is_the_weighted_mean_and_leaves_grey_as_it_is(dtype, value, data):
    value = value if dtype == np.float32 else value % (np.iinfo(dtype).max + 1)
    same = np.full((1, 3), value, dtype)
    np.testing.assert_array_equal(images.to_grey(same), [[value]])
    colour = np.array([data.draw(st.lists(st.integers(0, value), min_size=3, max_size=3))], dtype)
    exact = (colour.astype(np.float64) @ (0.299, 0.587, 0.114)).item()
    assert images.to_grey(colour).dtype == dtype
    assert images.to_grey(colour).item() == pytest.approx(exact, abs=0.5 + 2e-5 * value)


def test_grey_of_floats_is_the_same_in_batches_of_any_size():
    pixels = np.random.default_rng(0).random((2000, 3)).astype(np.float32)
    one_by_one = [images.to_grey(pixel) for pixel in pixels[:, None]]
    np.testing.assert_array_equal(images.to_grey(pixels), np.concatenate(one_by_one))


def test_the_time_to_slice_images_of_several_sizes_is_proportional_to_their_number():
    def seconds(count: int) -> float:
        sizes = np.tile([[1, 1], [1, 2]], (count // 2, 1))
        images = Images(np.zeros((int(sizes.prod(axis=1).sum()), 1), np.uint8), sizes=sizes)
        started = time.process_time()
        assert sum(len(images[index : index + 1].pixels) for index in range(count)) == len(images.pixels)
        return time.process_time() - started

    assert min(seconds(16_000) for _ in range(2)) < 8 * seconds(4_000)  # not 16 times as long


def test_digest_depends_on_pixels_shapes_types_and_pairs(mnist):
    digits = mnist.test.pixels[:4]
    flat = digits.reshape(-1, 1)
    different = [
        Images(digits),
        Images(digits[::-1]),
        Images(digits.reshape(4, 14, 56, 1)),
        Images(digits.astype(np.uint16)),
        Images(digits.astype(np.float32)),
        Images(flat, sizes=np.full((4, 2), 28)),
        Images(flat, sizes=np.array([[14, 56], *3 * [[28, 28]]])),
        Images(digits.reshape(4, 14, 28, 2)),
        Images(digits.reshape(4, 14, 28, 2), is_paired=True),
    ]
    digests = {images.digest for images in different}
    assert len(digests) == len(different)
    assert Images(digits.copy()).digest == different[0].digest
    assert len({datasets.Splits(train, train[:0], train[:1]).digest for train in different}) == len(different)


def test_pairs_larger_than_a_block_are_joined(pairs, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 3000)
    clean, noisy = pairs
    arrays = {"clean_train": clean, "noisy_train": noisy, "clean_test": clean, "noisy_test": noisy}
    splits = datasets.load(RunConfig(data=PYTHON_DATA, validation_examples=0), arrays)
    assert splits.train.image_shape == (28, 28, 1)
    np.testing.assert_array_equal(splits.train.pixels, np.stack(pairs, axis=-1))
