import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.data.images import Images, examples_per_epoch, examples_per_image
from dae.data.noise import NOISES, standard_normal
from dae.data.pipeline import (
    Batch,
    equal_batches,
    evaluation_batches,
    sample_batch,
    steps_per_epoch,
    training_batches,
)
from dae.seeding import stateless_seed

CONFIG = RunConfig(batch_size=32, epochs=2)


@pytest.fixture(scope="module")
def images(mnist) -> Images:
    return mnist.train[:100]  # 3 batches of 32 and one of 4


def arrays(batches: tf.data.Dataset) -> list[Batch]:
    return list(batches.as_numpy_iterator())


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for batch, other in zip(first, second, strict=True):
        for part, other_part in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, other_part)


def test_every_epoch_has_each_image_once_in_another_order(images):
    batches = arrays(training_batches(images, CONFIG))
    steps = steps_per_epoch(len(images), CONFIG.batch_size)
    number_of = {image.tobytes(): number for number, image in enumerate(images.pixels / np.float32(255))}
    first, second = (
        [number_of[image.tobytes()] for batch in epoch for image in batch.clean]
        for epoch in (batches[:steps], batches[steps:])
    )
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("images", ["one size", "several"])
def test_the_batches_of_an_evaluation_are_divided_among_the_workers(images, workers, mnist):
    of_one_size = {"one size": mnist.test[:1200], "several": SEVERAL}[images]
    whole = arrays(evaluation_batches(of_one_size, CONFIG, "test"))
    assert len(whole) >= workers
    for worker in range(workers):
        assert_same(arrays(evaluation_batches(of_one_size, CONFIG, "test", worker, workers)), whole[worker::workers])


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_number_of_threads_changes_no_batch(images, threads):
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    batches = training_batches(images, CONFIG)
    assert_same(arrays(batches.with_options(options)), arrays(batches))


def test_evaluation_batches_keep_the_order_and_repeat_their_noise(images):
    batches = evaluation_batches(images, CONFIG, "test")
    assert_same(arrays(batches), arrays(batches))
    (batch,) = arrays(batches)
    np.testing.assert_array_equal(batch.clean, images.pixels / np.float32(255))
    other_batch_size = dataclasses.replace(CONFIG, batch_size=7)
    assert_same(arrays(evaluation_batches(images, other_batch_size, "test")), arrays(batches))
    (other,) = arrays(evaluation_batches(images, CONFIG, "validation"))
    assert not np.array_equal(batch.noisy, other.noisy)


def test_first_batch_is_the_documented_function_of_seed_and_step(images):
    """A new version of the package must not change the batches of an old run."""
    batch, *_ = arrays(training_batches(images, CONFIG))
    order = tf.random.experimental.index_shuffle(
        tf.range(32, dtype=tf.int64), stateless_seed(0, "order", 0), tf.constant(99, tf.int64)
    )
    expected = tf.cast(tf.gather(images.pixels, order), tf.float32) / 255.0
    np.testing.assert_array_equal(batch.clean, expected)
    added = 0.5 * standard_normal((32, 28, 28, 1), stateless_seed(0, "noise", 0))
    np.testing.assert_array_equal(batch.noisy, tf.clip_by_value(expected + added, 0.0, 1.0))
    np.testing.assert_array_equal(batch.noise_level, np.full((32, 1, 1, 1), 0.5, np.float32))
    np.testing.assert_array_equal(batch.seed, stateless_seed(0, "loss", 0))


def test_range_of_noise_levels_gives_each_image_a_level_of_its_own(images):
    config = dataclasses.replace(CONFIG, noise_level=(0.1, 0.8), batch_size=100, epochs=20)
    levels = np.concatenate([batch.noise_level for batch in arrays(training_batches(images, config))])
    assert 0.1 <= levels.min() < 0.105
    assert 0.795 < levels.max() < 0.8
    assert levels.mean() == pytest.approx(0.45, abs=5 * 0.7 / math.sqrt(12 * 2000))


@pytest.mark.parametrize(
    ("noise", "level", "clip_noise"), [("gaussian", 0.3, True), ("speckle", 0.3, False), ("poisson", (0.1, 0.8), False)]
)
def test_batch_has_the_noise_level_of_each_image(noise, clip_noise, level, images):
    config = dataclasses.replace(CONFIG, noise=noise, noise_level=level, clip_noise=clip_noise)
    batches = {
        "": arrays(training_batches(images, config)),
        "test ": arrays(evaluation_batches(images, config, "test")),
    }
    for purpose, of_purpose in batches.items():
        for number, batch in enumerate(of_purpose):
            assert batch.noise_level.shape == (len(batch.clean), 1, 1, 1)
            assert batch.noise_level.dtype == np.float32
            assert len(np.unique(batch.noise_level)) == (1 if level == 0.3 else len(batch.clean))
            expected = NOISES[noise](batch.clean, batch.noise_level, stateless_seed(0, f"{purpose}noise", number))
            assert batch.seed.tolist() == stateless_seed(0, f"{purpose}loss", number).numpy().tolist()
            if clip_noise:
                expected = tf.clip_by_value(expected, 0.0, 1.0)
            np.testing.assert_allclose(batch.noisy, expected, atol=1e-6)


def test_large_images_are_evaluated_in_smaller_batches():
    large = Images(np.zeros((25, 500, 400, 3), np.uint8))
    assert [len(batch.clean) for batch in arrays(evaluation_batches(large, CONFIG, "test"))] == [10, 10, 5]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 500))
def test_equal_batches_are_counted_up_to_the_end_of_the_epoch(examples, batch_size, step):
    sizes = [len(range(examples)[start : start + batch_size]) for start in range(0, examples, batch_size)]
    left = sizes[step % len(sizes) :]
    assert equal_batches(examples, batch_size, step) == (left.count(left[0]), left[0])


def numbered(*shapes: tuple[int, int], is_paired: bool = False) -> Images:
    """Return images in which the value of each pixel, uint16, is its number among all pixels, if noisy from the end."""
    rows = np.arange(sum(height * width for height, width in shapes), dtype=np.uint16)[:, None]
    assert len(rows) <= 2**16
    rows = np.concatenate([rows, 65535 - rows], axis=1) if is_paired else rows
    return Images(rows, is_paired, np.array(shapes, np.int64))


def position(images: Images, patch: np.ndarray) -> tuple[int, int, int, int]:
    """Return the number of the image of a patch [H, W, 1], its upper left corner in it, and its symmetry.

    The bits of the symmetry: 1 for a mirrored second axis, 2 for a mirrored first one, 4 if both axes are exchanged.
    """
    numbers = np.rint(patch[..., 0].astype(np.float64) * 65535).astype(np.int64)
    ends = np.cumsum(images.shapes.prod(axis=1))
    (image,) = np.unique(np.searchsorted(ends, numbers, side="right"))
    rows, columns = np.divmod(numbers - (ends[image] - images.shapes[image].prod()), images.shapes[image, 1])
    transposed = int(rows[0, 0] == rows[-1, 0])
    if transposed:
        rows, columns = rows.T, columns.T
    mirrored = rows[0, 0] > rows[-1, 0], columns[0, 0] > columns[0, -1]
    top, left = rows.min(), columns.min()
    expected = np.mgrid[top : top + rows.shape[0], left : left + rows.shape[1]]
    for axis in (0, 1):
        if mirrored[axis]:
            expected = np.flip(expected, 1 + axis)
    np.testing.assert_array_equal([rows, columns], expected)  # it is a whole rectangle of the image
    return int(image), int(top), int(left), 4 * transposed + 2 * mirrored[transposed] + mirrored[1 - transposed]


SEVERAL = numbered((20, 30), (16, 16), (41, 17), (64, 50), (16, 90))
ONE_SIZE = Images(numbered(*20 * [(12, 14)]).pixels.reshape(20, 12, 14, 1))
PATCHES = RunConfig(batch_size=8, epochs=3, patch_size=16, noise_level=0)


def test_the_patches_of_an_epoch_can_be_stated_and_are_divided_by_area():
    config = dataclasses.replace(PATCHES, patches_per_epoch=40)
    per_image = examples_per_image(SEVERAL, config)
    areas = SEVERAL.shapes.prod(axis=1)
    np.testing.assert_allclose(per_image, 40 * areas / areas.sum(), atol=1)
    assert examples_per_image(SEVERAL, dataclasses.replace(config, patches_per_epoch=1)).tolist() == 5 * [1]
    first = SEVERAL[:1]
    batches = arrays(training_batches(first, config))
    assert [len(batch.clean) for batch in batches] == 15 * [8]
    found = [position(first, patch) for batch in batches for patch in batch.clean]
    assert len(set(found)) > 50  # of 5 x 15 corners


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_has_as_many_patches_of_each_image_as_its_area_holds(augment):
    config = dataclasses.replace(PATCHES, augment=augment)
    per_image = examples_per_image(SEVERAL, config).tolist()
    assert per_image == [2, 1, 2, 12, 5]
    assert examples_per_epoch(SEVERAL, config) == 22
    batches = arrays(training_batches(SEVERAL, config))
    assert [batch.clean.shape for batch in batches] == 3 * [(8, 16, 16, 1), (8, 16, 16, 1), (6, 16, 16, 1)]
    epochs = []
    for start in range(0, 9, 3):
        found = [position(SEVERAL, patch) for batch in batches[start : start + 3] for patch in batch.clean]
        assert np.bincount([image for image, *_ in found]).tolist() == per_image
        epochs.append(found)
    assert epochs[0] != epochs[1]
    # Other corners in every epoch, not only another order.
    assert len({patch for found in epochs for patch in found}) > 3 * 22 / 2
    assert {symmetry for found in epochs for *_, symmetry in found} == (set(range(8)) if augment else {0})
    if augment:  # the documented function of seed and step
        drawn = tf.random.stateless_uniform([8], stateless_seed(0, "symmetries", 0), 0, 8, tf.int64)
        assert [symmetry for *_, symmetry in epochs[0][:8]] == drawn.numpy().tolist()


def test_patches_are_cut_everywhere_in_an_image_and_all_symmetries_are_equally_frequent():
    images = numbered((18, 13), (11, 12))
    config = RunConfig(batch_size=100, epochs=1, patches_per_epoch=1400, patch_size=11, augment=True, noise_level=0)
    found = [position(images, patch) for batch in arrays(training_batches(images, config)) for patch in batch.clean]
    corners = np.zeros((8, 3), int)
    for image, top, left, _ in found:
        if image == 0:
            corners[top, left] += 1
    symmetries = np.bincount([symmetry for *_, symmetry in found])
    # Counts of the 24 corners and the 8 symmetries: within five standard deviations of equal shares.
    for counts in (corners, symmetries):
        assert np.abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        (SEVERAL, {"augment": True, "noise_level": (0.1, 0.8)}),
        (numbered((20, 30), (40, 40), (17, 50), is_paired=True), {"augment": True}),
        (ONE_SIZE, {"patch_size": None, "augment": True}),
    ],
)
def test_batches_from_a_later_step_are_the_last_ones_from_step_0(images, changes):
    config = dataclasses.replace(PATCHES, **changes)
    whole = arrays(training_batches(images, config))
    assert len(whole) >= 6
    for first_step in (1, 5):
        assert_same(arrays(training_batches(images, config, first_step)), whole[first_step:])
    other = arrays(training_batches(images, dataclasses.replace(config, seed=1)))
    assert not np.array_equal(whole[0].clean, other[0].clean)


def test_images_that_are_no_squares_are_flipped_and_not_turned():
    config = dataclasses.replace(PATCHES, patch_size=None, augment=True, epochs=8)
    found = [position(ONE_SIZE, patch) for batch in arrays(training_batches(ONE_SIZE, config)) for patch in batch.clean]
    assert {symmetry for *_, symmetry in found} == set(range(4))
    assert sorted(image for image, *_ in found) == sorted(8 * list(range(20)))


def test_noisy_and_clean_images_of_a_pair_are_cut_and_flipped_alike():
    images = numbered((20, 30), (16, 16), (64, 50), is_paired=True)
    clean = numbered((20, 30), (16, 16), (64, 50))
    for batch in arrays(training_batches(images, dataclasses.replace(PATCHES, noise_level=None, augment=True))):
        for one, noisy in zip(batch.clean, batch.noisy, strict=True):
            position(clean, one)
            np.testing.assert_array_equal(noisy, np.float32(65535 - np.rint(one * 65535)) / np.float32(65535))


def test_whole_images_of_several_sizes_are_evaluated_in_order():
    for config in (PATCHES, dataclasses.replace(PATCHES, augment=True, batch_size=3)):
        batches = arrays(evaluation_batches(SEVERAL, config, "test"))
        assert [batch.clean.shape for batch in batches] == [(1, *shape, 1) for shape in SEVERAL.shapes]
        assert [position(SEVERAL, batch.clean[0]) for batch in batches] == [(number, 0, 0, 0) for number in range(5)]


def test_sample_of_patches_is_cut_from_the_centres_of_images_that_are_large_enough():
    images = numbered((20, 30), (15, 90), (16, 16), (90, 15), (41, 17))
    batch = sample_batch(images, PATCHES, "test")
    assert [position(images, patch) for patch in batch.clean.numpy()] == [(0, 2, 7, 0), (2, 0, 0, 0), (4, 12, 0, 0)]
    assert_same([sample_batch(images, PATCHES, "test")], [batch])
    small = numbered((15, 20), (14, 14))
    (expected, _) = arrays(evaluation_batches(small, PATCHES, "test"))
    assert_same([sample_batch(small, PATCHES, "test")], [expected])
