import math

import numpy as np
import pytest
import tensorflow as tf
from helpers import new_state, new_train_loop, objective, rejected
from hypothesis import given, settings
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.data import noise
from dae.data.noise import NOISES
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import make_evaluator

# 64 images of 28 x 28 of one value each: 50,176 draws.
PIXELS = 64 * 28 * 28
SEEDS = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**6))
VALUES = st.floats(0, 1, width=32)

# Mean and variance of the noisy value of a pixel x at a level a.
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


@EACH_NOISE
@given(value=VALUES, level=st.floats(0.02, 1), seed=SEEDS)
@settings(max_examples=10)
def test_noise_has_the_mean_and_variance_of_its_formula(name, value, level, seed):
    sample = noisy(name, value, level, seed).astype(np.float64).ravel()
    mean, variance = MOMENTS[name](value, level)
    fourth = ((sample - mean) ** 4).mean()
    assert sample.mean() == pytest.approx(mean, abs=6 * math.sqrt(variance / PIXELS) + 1e-6)
    # The last term allows for a rare large deviation, which a sample may lack.
    error = math.sqrt(max(fourth - variance**2, 0) / PIXELS) + 1 / PIXELS
    assert ((sample - mean) ** 2).mean() == pytest.approx(variance, abs=6 * error + 1e-6)


@EACH_NOISE
def test_noise_of_another_seed_or_step_is_uncorrelated(name):
    first, *later = (noisy(name, 0.5, 0.4, seed).ravel() for seed in ((3, 4), (3, 5), (4, 4)))
    assert [abs(np.corrcoef(first, image)[0, 1]) < 6 / math.sqrt(PIXELS) for image in later] == [True, True]


@EACH_NOISE
def test_one_level_per_image_gives_the_same_noise_as_one_level_for_all_and_0_changes_no_bit(name, mnist):
    clean = tf.constant(mnist.train.pixels[:64] / np.float32(255))
    seed = tf.constant([3, 4], tf.int64)
    levels = np.array([0, *31 * [0.2], *32 * [0.7]], np.float32)
    mixed = NOISES[name](clean, levels.reshape(64, 1, 1, 1), seed)
    for level in np.unique(levels):
        of_level = NOISES[name](clean, level, seed)
        np.testing.assert_array_equal(mixed[levels == level], of_level[levels == level])
        changed = tf.reduce_any(of_level != clean, axis=[1, 2, 3])
        assert changed.numpy().tolist() == 64 * [level > 0]


@pytest.mark.parametrize("mean", [0.0, 0.3, 4.0, 19.9])
def test_small_poisson_has_the_poisson_distribution(mean):
    counts = noise.small_poisson(tf.fill([200_000], mean), tf.constant([5, 6], tf.int64)).numpy()
    for k in range(45):
        p = math.exp(-mean + (k * math.log(mean) if mean else 0) - math.lgamma(k + 1)) if mean or k == 0 else 0.0
        assert (counts == k).mean() == pytest.approx(p, abs=6 * math.sqrt(p / 200_000) + 2e-5), k


@pytest.mark.parametrize("name", ["salt_pepper", "masking"])
def test_probability_of_1_changes_every_value_and_a_higher_one_is_rejected(name):
    some = noisy(name, 0.5, 1.0, (1, 2))
    assert set(np.unique(some)) == ({0, 1} if name == "salt_pepper" else {0})
    with pytest.raises(UsageError, match=rf"--noise-level: .*0 to 1\b.*{name}.*1\.5"):
        noise.check(RunConfig(noise=name), (10, 10, 1), (0.0, 1.5))


@pytest.mark.parametrize(
    ("values", "is_paired", "expected"),
    [
        ({}, False, (0.5, 0.5)),
        ({}, True, (0, 0)),
        ({"noise_level": 0.3}, True, (0.3, 0.3)),
        ({"noise_level": (0.1, 0.3), "noise": "poisson"}, True, (0.1, 0.3)),
        ({"noise": "poisson"}, False, (0.5, 0.5)),
    ],
)
def test_the_default_level_is_that_of_the_tutorial_or_0_for_pairs(values, is_paired, expected):
    assert noise.level_range(RunConfig(**values), is_paired) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gaussian", "--noise-level: 25 for gaussian leaves hardly anything of the images"),
        ("poisson", "--noise-level: 25 for poisson leaves hardly anything of the images"),
        ("own", ""),
    ],
)
def test_a_level_that_leaves_hardly_anything_of_an_image_is_warned_of(name, words, tmp_path, capsys):
    (tmp_path / "own.py").write_text(USER_NOISES)
    config = RunConfig(noise=f"{tmp_path}/own.py:good" if name == "own" else name)
    noise.check(config, (10, 10, 1), (2.0, 2.0))
    assert capsys.readouterr().err == ""
    noise.check(config, (10, 10, 1), (0.5, 25.0))
    assert capsys.readouterr().err.startswith(f"warning: {words}") == bool(words)


USER_NOISES = """
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

def eager(clean, level, seed):
    return clean + float(seed[0].numpy())
"""


@pytest.mark.parametrize("levels", [(0.5, 0.5), (0.1, 0.8)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eager", r"fails .*\(AttributeError: .*numpy"),  # only in a graph
        ("flat", r"float32 \[2, 10, 10, 1\], got float32 \[200\]"),
        ("endless", "not finite"),
        ("fails", r"line 15 \(NameError"),
        ("unseeded", "graph and eager mode"),
        ("frozen", "graph and eager mode"),
    ],
)
def test_user_noise_that_breaks_the_rules_is_rejected(name, message, levels, tmp_path):
    (tmp_path / "own.py").write_text(USER_NOISES)
    with rejected(match=f"own.py:{name}: .*{message}"):
        noise.check(RunConfig(noise=f"{tmp_path}/own.py:{name}"), (10, 10, 1), levels)


def test_user_noise_of_a_shape_unknown_to_the_graph_trains(tmp_path, mnist):
    (tmp_path / "own.py").write_text(
        "import numpy as np\nimport tensorflow as tf\n\ndef smeared(clean, level, seed):\n"
        "    return tf.numpy_function(lambda x: (x + np.roll(x, 1, axis=2)) / 2, [clean], tf.float32)\n"
    )
    config = RunConfig(noise=f"{tmp_path}/own.py:smeared", batch_size=32, epochs=1, shards=2)
    noise.check(config, (28, 28, 1), (0.5, 0.5))
    batches = training_batches(mnist.train[:160], config)
    assert batches.element_spec.noisy.shape.rank is None
    state = new_state(config)
    before = state.model.get_weights()
    assert 0 < float(new_train_loop(state, config)(iter(batches), 5, 32)) < 0.7
    assert int(state.step) == 5
    assert all((old != new).any() for old, new in zip(before, state.model.get_weights(), strict=True))
    evaluate = make_evaluator(state.model, objective("bce", config))
    assert 0 < evaluate("test", evaluation_batches(mnist.test[:9], config, "test"))["test_loss"] < 0.7
