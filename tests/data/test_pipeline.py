import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.data.noise import NOISES, standard_normal
from dae.data.pipeline import evaluation_batches, steps_per_epoch, training_batches
from dae.seeding import stateless_seed

CONFIG = RunConfig(batch_size=32, epochs=2)


@pytest.fixture(scope="module")
def images(mnist) -> np.ndarray:
    return mnist.train[:100]  # 3 batches of 32 and one of 4


def arrays(batches: tf.data.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(batches.as_numpy_iterator())


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (noisy, clean), (other_noisy, other_clean) in zip(first, second, strict=True):
        np.testing.assert_array_equal(noisy, other_noisy)
        np.testing.assert_array_equal(clean, other_clean)


def test_batches_are_images_in_0_to_1_and_the_last_is_smaller(images):
    batches = arrays(training_batches(images, CONFIG))
    assert [clean.shape for _, clean in batches] == [(32, 28, 28, 1)] * 3 + [(4, 28, 28, 1)] + [(32, 28, 28, 1)] * 3 + [
        (4, 28, 28, 1)
    ]
    for noisy, clean in batches:
        assert noisy.dtype == clean.dtype == np.float32
        for part in (noisy, clean):
            assert part.min() >= 0
            assert part.max() <= 1


def test_every_epoch_has_every_image_once_in_an_order_and_with_noise_of_its_own(images):
    batches = arrays(training_batches(images, CONFIG))
    steps = steps_per_epoch(len(images), CONFIG.batch_size)
    noisy, clean = ([np.concatenate(part) for part in zip(*batches[at : at + steps], strict=True)] for at in (0, steps))
    first_noisy, first_clean = noisy
    second_noisy, second_clean = clean

    def places(shown: np.ndarray) -> list[int]:
        flat = (images / np.float32(255)).astype(np.float32).reshape(len(images), -1)
        return [int(np.flatnonzero((flat == one.ravel()).all(axis=1))[0]) for one in shown]

    first, second = places(first_clean), places(second_clean)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)
    again = [second.index(place) for place in first]
    noise_of_first, noise_of_second = first_noisy - first_clean, (second_noisy - second_clean)[again]
    assert abs(np.corrcoef(noise_of_first.ravel(), noise_of_second.ravel())[0, 1]) < 0.5
    assert not (noise_of_first == noise_of_second).all(axis=(1, 2, 3)).any()


def test_the_unclipped_noise_of_two_steps_is_uncorrelated(images):
    config = dataclasses.replace(CONFIG, clip_noise=False, batch_size=100)
    (noisy, clean), (noisy_2, clean_2) = arrays(training_batches(images, config))
    first, second = (noisy - clean).ravel(), (noisy_2 - clean_2).ravel()
    # 78,400 pixels: a correlation of independent noise stays within 5 / sqrt(78,400) of 0.
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 280
    assert first.mean() == pytest.approx(0, abs=5 * 0.5 / 280)
    assert first.std() == pytest.approx(0.5, rel=0.02)


def test_two_pipelines_of_one_seed_agree_bit_for_bit_and_of_two_seeds_do_not(images):
    assert_same(arrays(training_batches(images, CONFIG)), arrays(training_batches(images, CONFIG)))
    other = arrays(training_batches(images, dataclasses.replace(CONFIG, seed=1)))
    assert not np.array_equal(arrays(training_batches(images, CONFIG))[0][0], other[0][0])


@pytest.mark.parametrize("first_step", [1, 3, 4, 6, 8])
def test_a_pipeline_from_step_k_is_the_tail_of_one_from_0(images, first_step):
    whole = arrays(training_batches(images, CONFIG))
    assert_same(arrays(training_batches(images, CONFIG, first_step)), whole[first_step:])


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_parallelism_changes_nothing(images, threads):
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    batches = training_batches(images, CONFIG)
    assert_same(arrays(batches.with_options(options)), arrays(batches))


def test_evaluation_keeps_the_order_and_repeats_its_noise(images):
    batches = evaluation_batches(images, CONFIG, "test")
    assert_same(arrays(batches), arrays(batches))
    noisy, clean = arrays(batches)[0]
    np.testing.assert_array_equal(clean, (images / np.float32(255)).astype(np.float32))
    other_batch_size = dataclasses.replace(CONFIG, batch_size=7)
    assert_same(arrays(evaluation_batches(images, other_batch_size, "test")), arrays(batches))
    assert not np.array_equal(noisy, arrays(evaluation_batches(images, CONFIG, "validation"))[0][0])


def test_the_default_noise_is_what_it_was_when_there_was_one_level_only(images):
    """As a formula, since its bits are TensorFlow's: order, seeds and level of a step decide the batch and no more."""
    (noisy, clean), *_ = arrays(training_batches(images, CONFIG))
    order = tf.random.experimental.index_shuffle(
        tf.range(32, dtype=tf.int64), stateless_seed(0, "order", 0), tf.constant(99, tf.int64)
    )
    expected = tf.cast(tf.gather(images, order), tf.float32) / 255.0
    np.testing.assert_array_equal(clean, expected)
    added = 0.5 * standard_normal((32, 28, 28, 1), stateless_seed(0, "noise", 0))
    np.testing.assert_array_equal(noisy, tf.clip_by_value(expected + added, 0.0, 1.0))


def test_a_range_of_levels_gives_each_image_its_own(images):
    config = dataclasses.replace(CONFIG, noise_level=(0.1, 0.8), clip_noise=False, batch_size=100, epochs=20)
    batches = training_batches(images, config)
    assert_same(arrays(batches), arrays(batches))
    levels = np.concatenate([(noisy - clean).std(axis=(1, 2, 3)) for noisy, clean in arrays(batches)])
    # 2,000 levels, each measured to 0.8 / sqrt(2 * 784) at worst.
    assert 0.09 < levels.min() < 0.11
    assert 0.75 < levels.max() < 0.87
    assert levels.mean() == pytest.approx(0.45, abs=5 * 0.7 / math.sqrt(12 * 2000))
    first, second = (arrays(evaluation_batches(images, config, "test"))[0] for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[0] - first[1]).std(axis=(1, 2, 3)).std() > 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_clipped_noise_stays_in_the_range_of_images(images, noise):
    for noisy, _ in arrays(training_batches(images, dataclasses.replace(CONFIG, noise=noise, noise_level=(0, 1)))):
        assert noisy.dtype == np.float32
        assert 0 <= noisy.min() <= noisy.max() <= 1


def test_large_images_are_evaluated_in_smaller_batches():
    large = np.zeros((25, 500, 400, 3), np.uint8)
    assert [len(clean) for _, clean in arrays(evaluation_batches(large, CONFIG, "test"))] == [10, 10, 5]
