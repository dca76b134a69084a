import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.errors import UsageError
from dae.noise import gaussian
from dae.pipeline import evaluation_batches, steps_per_epoch, training_batches

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


def test_noise_of_level_0_is_none(images):
    clean = tf.constant(images / np.float32(255))
    np.testing.assert_array_equal(gaussian(clean, 0.0, tf.constant([1, 2])), clean)


def test_an_unknown_noise_is_refused(images):
    with pytest.raises(UsageError, match="--noise: unknown name 'gausian'; did you mean 'gaussian'"):
        training_batches(images, dataclasses.replace(CONFIG, noise="gausian"))
