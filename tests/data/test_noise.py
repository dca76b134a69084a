import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.data.noise import NOISES, check, named, small_poisson
from dae.errors import UsageError
from dae.training import trainer

# 64 images of 28 x 28 of one value each: 50,176 draws.
PIXELS = 64 * 28 * 28
SEEDS = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**6))
VALUES = st.floats(0, 1, width=32)

# Mean and variance of a value x at a level a.
MOMENTS = {
    "gaussian": lambda x, a: (x, a**2),
    "uniform": lambda x, a: (x, a**2 / 3),
    "salt_pepper": lambda x, a: ((1 - a) * x + a / 2, (1 - a) * x**2 + a / 2 - ((1 - a) * x + a / 2) ** 2),
    "masking": lambda x, a: ((1 - a) * x, a * (1 - a) * x**2),
    "speckle": lambda x, a: (x, (a * x) ** 2),
    "poisson": lambda x, a: (x, a * x),
}
EACH_NOISE = pytest.mark.parametrize("name", NOISES)


def noisy(name: str, value: float, level, seed) -> np.ndarray:
    return NOISES[name](tf.fill((64, 28, 28, 1), value), level, tf.constant(seed, tf.int64)).numpy()


def test_every_noise_has_its_moments_in_the_table():
    assert set(MOMENTS) == set(NOISES)


@EACH_NOISE
@given(value=VALUES, level=st.floats(0.02, 1), seed=SEEDS)
@settings(max_examples=15, derandomize=True)
def test_mean_and_variance_are_those_of_the_formula(name, value, level, seed):
    sample = noisy(name, value, level, seed).astype(np.float64).ravel()
    mean, variance = MOMENTS[name](value, level)
    fourth = ((sample - mean) ** 4).mean()
    assert sample.mean() == pytest.approx(mean, abs=6 * math.sqrt(variance / PIXELS) + 1e-6)
    # A rare large deviation, which a sample may lack, is what the last term allows for.
    error = math.sqrt(max(fourth - variance**2, 0) / PIXELS) + 1 / PIXELS
    assert ((sample - mean) ** 2).mean() == pytest.approx(variance, abs=6 * error + 1e-6)


@EACH_NOISE
@given(value=st.floats(0.25, 0.75, width=32), level=st.floats(0.1, 0.9), seed=SEEDS)
@settings(max_examples=10, derandomize=True)
def test_the_same_seed_gives_the_same_bits_and_another_step_other_noise(name, value, level, seed):
    first, again = noisy(name, value, level, seed), noisy(name, value, level, seed)
    np.testing.assert_array_equal(first, again)
    other = noisy(name, value, level, (seed[0], seed[1] + 1))
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 6 / math.sqrt(PIXELS)


@EACH_NOISE
def test_level_0_is_the_identity_to_the_bit_also_of_one_image_among_noisy_ones(name, mnist):
    clean = tf.constant(mnist.train[:64] / np.float32(255))
    seed = tf.constant([3, 4], tf.int64)
    np.testing.assert_array_equal(NOISES[name](clean, 0.0, seed), clean)
    levels = tf.reshape(tf.concat([[0.0], tf.fill([63], 0.3)], axis=0), (64, 1, 1, 1))
    changed = tf.reduce_any(NOISES[name](clean, levels, seed) != clean, axis=[1, 2, 3])
    assert changed.numpy().tolist() == [False] + 63 * [True]


@EACH_NOISE
def test_a_level_for_each_image_does_to_each_what_one_level_does(name, mnist):
    clean = tf.constant(mnist.train[:64] / np.float32(255))
    seed = tf.constant([3, 4], tf.int64)
    levels = tf.reshape(tf.where(tf.range(64) < 32, 0.2, 0.7), (64, 1, 1, 1))
    mixed = NOISES[name](clean, levels, seed)
    np.testing.assert_array_equal(mixed[:32], NOISES[name](clean, 0.2, seed)[:32])
    np.testing.assert_array_equal(mixed[32:], NOISES[name](clean, 0.7, seed)[32:])


@pytest.mark.parametrize("mean", [0.0, 0.3, 4.0, 19.9])
def test_small_poisson_numbers_have_the_distribution(mean):
    counts = small_poisson(tf.fill([200_000], mean), tf.constant([5, 6], tf.int64)).numpy()
    for k in range(45):
        p = math.exp(-mean + (k * math.log(mean) if mean else 0) - math.lgamma(k + 1)) if mean or k == 0 else 0.0
        assert (counts == k).mean() == pytest.approx(p, abs=6 * math.sqrt(p / 200_000) + 2e-5), k


@pytest.mark.parametrize("name", ["salt_pepper", "masking"])
def test_a_probability_of_1_changes_every_value_and_more_is_refused(name):
    some = noisy(name, 0.5, 1.0, (1, 2))
    assert set(np.unique(some)) == ({0, 1} if name == "salt_pepper" else {0})
    with pytest.raises(UsageError, match=f"--noise-level: 1.5 is not from 0 to 1, as a level of {name} must be"):
        named(name, 1.5)


def test_an_unknown_noise_is_refused():
    with pytest.raises(UsageError, match="--noise: unknown name 'gausian'; did you mean 'gaussian'"):
        named("gausian", 0.5)


OWN_NOISE = """
import numpy as np
import tensorflow as tf

def good(clean, level, seed):
    return clean + level

def flat(clean, level, seed):
    return tf.reshape(clean, [-1])

def endless(clean, level, seed):
    return clean / (0 * clean)

def fails(clean, level, seed):
    return clean + undefined

def unseeded(clean, level, seed):
    return clean + tf.random.normal(tf.shape(clean))

def frozen(clean, level, seed):
    return clean + np.random.normal(size=(10, 10, 1)).astype("float32")
"""


@pytest.mark.parametrize("level", [0.5, (0.1, 0.8)])
def test_a_noise_of_ones_own_is_checked_before_the_run(level, tmp_path):
    (tmp_path / "own.py").write_text(OWN_NOISE)
    for name, message in {
        "good": None,
        "flat": r"own.py:flat: returns float32 \[200\] for float32 \[2, 10, 10, 1\]",
        "endless": "own.py:endless: is not finite for grey images and --noise-level",
        "fails": "own.py:fails: fails in line 15 .NameError",
        "unseeded": "own.py:unseeded: is not the same in a graph as line by line",
        "frozen": "own.py:frozen: is not the same in a graph as line by line",
    }.items():
        config = RunConfig(noise=f"{tmp_path}/own.py:{name}", noise_level=level)
        with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
            check(config, (10, 10, 1))


def test_a_noise_that_fails_in_a_graph_only_is_refused_with_its_line(tmp_path):
    (tmp_path / "own.py").write_text("def eager(clean, level, seed):\n    return clean + float(seed[0].numpy())\n")
    message = r"own.py:eager: fails in line 2 .AttributeError: 'SymbolicTensor' object has no attribute 'numpy'"
    with pytest.raises(UsageError, match=message):
        check(RunConfig(noise=f"{tmp_path}/own.py:eager"), (10, 10, 1))


def test_a_noise_whose_shape_the_graph_does_not_know_trains(tmp_path):
    (tmp_path / "own.py").write_text(
        "import numpy as np\nimport tensorflow as tf\n\ndef smeared(clean, level, seed):\n"
        "    return tf.numpy_function(lambda x: (x + np.roll(x, 1, axis=2)) / 2, [clean], tf.float32)\n"
    )
    config = replace(TINY, epochs=1, noise=f"{tmp_path}/own.py:smeared")
    assert trainer.train(config, tmp_path / "run")["test_loss"] < 0.7
