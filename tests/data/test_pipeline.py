import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.noise import NOISES, standard_normal
from dae.data.pipeline import (
    Batch,
    equal_batches,
    evaluation_batches,
    sample_batch,
    split_batch,
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


def test_batches_are_floats_from_0_to_1_and_the_last_of_an_epoch_is_smaller(images):
    batches = arrays(training_batches(images, CONFIG))
    assert [batch.clean.shape for batch in batches] == 2 * [*3 * [(32, 28, 28, 1)], (4, 28, 28, 1)]
    for batch in batches:
        for part in (batch.noisy, batch.clean):
            assert part.dtype == np.float32
            assert part.min() >= 0
            assert part.max() <= 1


def test_every_epoch_has_each_image_once_in_another_order_with_other_noise(images):
    batches = arrays(training_batches(images, CONFIG))
    steps = steps_per_epoch(len(images), CONFIG.batch_size)
    epochs = (batches[:steps], batches[steps:])
    first_noisy, second_noisy = (np.concatenate([batch.noisy for batch in epoch]) for epoch in epochs)
    first_clean, second_clean = (np.concatenate([batch.clean for batch in epoch]) for epoch in epochs)

    def indices(clean: np.ndarray) -> list[int]:
        flat = (images.pixels / np.float32(255)).reshape(len(images), -1)
        return [int(np.flatnonzero((flat == image.ravel()).all(axis=1))[0]) for image in clean]

    first, second = indices(first_clean), indices(second_clean)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)
    same_images = [second.index(index) for index in first]
    noise_of_first, noise_of_second = first_noisy - first_clean, (second_noisy - second_clean)[same_images]
    assert abs(np.corrcoef(noise_of_first.ravel(), noise_of_second.ravel())[0, 1]) < 0.5
    assert not (noise_of_first == noise_of_second).all(axis=(1, 2, 3)).any()


def test_unclipped_noise_of_two_steps_is_uncorrelated(images):
    config = dataclasses.replace(CONFIG, clip_noise=False, batch_size=100)
    first, second = ((batch.noisy - batch.clean).ravel() for batch in arrays(training_batches(images, config)))
    # 78,400 pixels: the correlation of independent noise is within 5 / sqrt(78,400) of 0.
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 280
    assert first.mean() == pytest.approx(0, abs=5 * 0.5 / 280)
    assert first.std() == pytest.approx(0.5, rel=0.02)


def test_training_batches_repeat_bit_for_bit_and_differ_with_another_seed(images):
    assert_same(arrays(training_batches(images, CONFIG)), arrays(training_batches(images, CONFIG)))
    other = arrays(training_batches(images, dataclasses.replace(CONFIG, seed=1)))
    assert not np.array_equal(arrays(training_batches(images, CONFIG))[0].noisy, other[0].noisy)


@pytest.mark.parametrize("level", [0.5, (0.1, 0.8)])
@pytest.mark.parametrize("first_step", [1, 3, 4, 6, 8])
def test_batches_from_a_later_step_are_the_last_ones_from_step_0(images, first_step, level):
    config = dataclasses.replace(CONFIG, noise_level=level)
    whole = arrays(training_batches(images, config))
    assert_same(arrays(training_batches(images, config, first_step)), whole[first_step:])


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
    config = dataclasses.replace(CONFIG, noise_level=(0.1, 0.8), clip_noise=False, batch_size=100, epochs=20)
    batches = training_batches(images, config)
    assert_same(arrays(batches), arrays(batches))
    levels = np.concatenate([(batch.noisy - batch.clean).std(axis=(1, 2, 3)) for batch in arrays(batches)])
    # 2,000 levels, each measured with an error of at most 0.8 / sqrt(2 * 784).
    assert 0.09 < levels.min() < 0.11
    assert 0.75 < levels.max() < 0.87
    assert levels.mean() == pytest.approx(0.45, abs=5 * 0.7 / math.sqrt(12 * 2000))
    first, second = (arrays(evaluation_batches(images, config, "test"))[0] for _ in range(2))
    assert_same([first], [second])
    assert (first.noisy - first.clean).std(axis=(1, 2, 3)).std() > 0.1


@pytest.mark.parametrize("level", [0.3, (0.1, 0.8)])
@pytest.mark.parametrize("clip_noise", [True, False])
@pytest.mark.parametrize("noise", NOISES)
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
            if clip_noise:
                expected = tf.clip_by_value(expected, 0.0, 1.0)
            np.testing.assert_allclose(batch.noisy, expected, atol=1e-6)


def test_seeds_differ_between_steps_shards_purposes_and_runs(images):
    batches = [
        *arrays(training_batches(images, CONFIG)),
        *arrays(training_batches(images, dataclasses.replace(CONFIG, seed=1))),
        *(arrays(evaluation_batches(images, CONFIG, purpose))[0] for purpose in ("validation", "test")),
    ]
    shards = [shard for batch in batches for shard in split_batch(batch, 2)]
    assert len(shards) == 2 * len(batches)
    seeds = {tuple(np.asarray(each.seed).tolist()) for each in (*batches, *shards)}
    assert len(seeds) == 3 * len(batches)


@pytest.mark.parametrize("noise", NOISES)
def test_clipped_noise_stays_between_0_and_1(images, noise):
    for batch in arrays(training_batches(images, dataclasses.replace(CONFIG, noise=noise, noise_level=(0, 1)))):
        assert batch.noisy.dtype == np.float32
        assert 0 <= batch.noisy.min() <= batch.noisy.max() <= 1


def test_large_images_are_evaluated_in_smaller_batches():
    large = Images(np.zeros((25, 500, 400, 3), np.uint8))
    assert [len(batch.clean) for batch in arrays(evaluation_batches(large, CONFIG, "test"))] == [10, 10, 5]


def test_sample_batch_is_the_first_evaluation_batch(mnist):
    images = mnist.test[:600]
    first = next(evaluation_batches(images, CONFIG, "test").as_numpy_iterator())
    assert len(first.noisy) == 500
    assert_same([sample_batch(images, CONFIG, "test")], [first])


@pytest.mark.parametrize(
    ("images", "shards", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [3, 4]), (3, 8, 3 * [1]), (5, 1, [5]), (10, 4, [2, 3, 2, 3])],
)
def test_split_batch_makes_nearly_equal_parts_in_order(images, shards, sizes):
    numbers = tf.range(images)
    batch = Batch(numbers, numbers + 100, numbers + 200, seed=tf.constant([3, 4], tf.int64))
    parts = split_batch(batch, shards)
    for name in ("noisy", "clean", "noise_level"):
        split = [getattr(part, name) for part in parts]
        assert [len(each) for each in split] == sizes
        np.testing.assert_array_equal(tf.concat(split, axis=0), getattr(batch, name))


@pytest.mark.parametrize(
    ("step", "expected"), [(0, (3, 32)), (2, (1, 32)), (3, (1, 4)), (4, (3, 32)), (7, (1, 4)), (9, (2, 32))]
)
def test_equal_batches_are_counted_up_to_the_end_of_the_epoch(step, expected):
    assert equal_batches(100, 32, step) == expected


def test_equal_batches_without_a_smaller_last_batch():
    assert [equal_batches(64, 32, step) for step in range(3)] == [(2, 32), (1, 32), (2, 32)]
