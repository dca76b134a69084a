"""Tests of what a loss can ask for besides the images, and of the BCE warm-up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, new_state, new_train_step, objective, rejected, small_network

from dae.config import RunConfig
from dae.data.noise import corruption
from dae.data.pipeline import Batch, training_batches
from dae.errors import UsageError
from dae.losses import composite
from dae.losses.composite import INPUTS, CompositeLoss, Term
from dae.losses.losses import LOSSES
from dae.models import networks
from dae.models.fused_layers import Outputs, fused
from dae.replicas import split
from dae.seeding import stateless_seed

RANGE = replace(TINY, batch_size=16, noise_level=(0.2, 0.8), clip_noise=False)


def loss_of(function: Callable) -> CompositeLoss:
    return CompositeLoss((Term(1.0, "mine", function, "mine"),))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return networks.build(RANGE, (28, 28, 1))


@pytest.fixture(scope="module")
def batch(mnist) -> Batch:
    """The first batch of RANGE."""
    return next(iter(training_batches(mnist.train, RANGE)))


def call(function: Callable, model: keras.Model, batch: Batch, config: RunConfig = RANGE, step: int = 0) -> Any:
    """Return the values of a user's loss for a batch, with `step` of 30 steps done."""
    made = objective(loss_of(function), config, tf.Variable(step, dtype=tf.int64))
    outputs = fused(model)(batch.noisy)
    return made.loss(batch.clean, outputs.denoised, made.inputs(fused(model), batch, outputs))["loss"]


def inputs(model: keras.Model, batch: Batch, config: RunConfig = RANGE, step: int = 0) -> dict[str, Any]:
    """Return what a loss receives that asks for everything."""
    received: dict[str, Any] = {}

    def mine(
        clean, denoised, *, noisy, second_noisy, latents, noise_level, step, progress, seed, denoise, encode, corrupt,
        config,
    ):  # fmt: skip
        received.update(locals())
        return tf.zeros([len(clean)])

    call(mine, model, batch, config, step)
    del received["received"]
    assert received.keys() == {"clean", "denoised", *INPUTS}
    return received


def test_loss_receives_exactly_what_it_declares(model, batch):
    received: dict[str, Any] = {}

    def mine(clean, denoised, factor=2.0, *, noisy, latents=None, other=3.0, **more):
        received.update(locals())
        return tf.zeros([len(clean)])

    call(mine, model, batch)
    assert (received["factor"], received["other"], received["more"]) == (2.0, 3.0, {})
    np.testing.assert_array_equal(received["noisy"], batch.noisy)
    np.testing.assert_array_equal(received["clean"], batch.clean)
    np.testing.assert_array_equal(received["denoised"], fused(model)(batch.noisy).denoised)
    assert received["latents"] is not None


def test_every_input_has_the_documented_shape_and_type(model, batch):
    received = inputs(model, batch)
    expected = {
        "noisy": (tf.float32, (16, 28, 28, 1)),
        "second_noisy": (tf.float32, (16, 28, 28, 1)),
        "latents": (tf.float32, (16, 4, 4, 8)),
        "noise_level": (tf.float32, (16, 1, 1, 1)),
        "step": (tf.int64, ()),
        "progress": (tf.float32, ()),
        "seed": (tf.int64, (2,)),
    }
    assert {name: (received[name].dtype, tuple(received[name].shape)) for name in expected} == expected
    assert received["config"] is RANGE
    np.testing.assert_array_equal(received["noisy"], batch.noisy)
    np.testing.assert_array_equal(received["noise_level"], batch.noise_level)


def test_latents_encode_and_denoise_are_those_of_the_network(model, batch):
    received = inputs(model, batch)
    np.testing.assert_allclose(received["denoise"](batch.clean), model(batch.clean), atol=1e-5)
    encoder = keras.Model(model.inputs, model.get_layer("encoder").output)
    np.testing.assert_allclose(received["latents"], encoder(batch.noisy), atol=1e-5)
    np.testing.assert_allclose(received["encode"](batch.clean), encoder(batch.clean), atol=1e-5)
    assert float(tf.reduce_max(received["latents"])) > 0.01


@pytest.mark.parametrize(("noise", "clip"), [("gaussian", True), ("gaussian", False), ("masking", False)])
def test_corrupt_is_the_noise_of_the_run(noise, clip, model, mnist):
    config = replace(RANGE, noise=noise, clip_noise=clip)
    batch = next(iter(training_batches(mnist.train, config)))
    received = inputs(model, batch, config)
    # The same seed gives the noise of the batch itself.
    again = received["corrupt"](batch.clean, stateless_seed(config.seed, "noise", 0))
    np.testing.assert_array_equal(again, batch.noisy)
    seed = tf.constant([3, 4], tf.int64)
    expected = corruption(config, 0.8)(1 - batch.clean, batch.noise_level, seed)
    np.testing.assert_array_equal(received["corrupt"](1 - batch.clean, seed), expected)
    outside = bool(tf.reduce_any((expected < 0) | (expected > 1)))
    assert outside == (noise == "gaussian" and not clip)
    for name in ("noisy", "second_noisy"):
        assert bool(tf.reduce_any((received[name] < 0) | (received[name] > 1))) == outside


def test_train_step_gives_each_step_and_shard_its_own_inputs(mnist):
    config = replace(TINY, shards=2, bce_steps=0)
    seen = []

    def mine(clean, denoised, *, step, progress, seed, noise_level):
        def record(*values):
            seen.append([value.numpy().tolist() for value in values])

        with tf.control_dependencies([tf.py_function(record, [step, progress, seed, tf.shape(noise_level)], [])]):
            return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])

    state = new_state(config, model=small_network((28, 28, 1)))
    train_step = new_train_step(state, config, loss_of(mine))
    batches = list(training_batches(mnist.train[:600], config).take(3))
    for batch in batches:
        train_step(batch)
    steps = sorted(step for step, *_ in seen)
    assert steps == [0, 0, 1, 1, 2, 2]
    assert [progress for step, progress, *_ in seen] == pytest.approx([step / 30 for step, *_ in seen])
    assert [shape for *_, shape in seen] == [[32, 1, 1, 1]] * 6
    assert len({tuple(seed) for _, _, seed, _ in seen}) == 6
    expected = {tuple(shard.batch.seed.numpy()) for batch in batches for shard in split(batch, 2)}
    assert {tuple(seed) for _, _, seed, _ in seen} == expected


def doubled_if_bright(clean, level, seed):
    if tf.reduce_mean(clean) > 0.05:
        level = 2 * level
    return clean + level


def test_losses_and_noise_of_users_can_branch_on_tensors(mnist):
    def mine(clean, denoised, *, step, second_noisy):
        if step < 1:
            return tf.reduce_mean(tf.square(second_noisy - clean), axis=[1, 2, 3]) + 0 * tf.reduce_mean(denoised)
        return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])

    branching: Any = doubled_if_bright
    config = RunConfig(noise=branching, noise_level=0.5, clip_noise=False, batch_size=16, bce_steps=0)
    state = new_state(config, model=small_network((28, 28, 1)))
    train_step = new_train_step(state, config, loss_of(mine))
    first, second = training_batches(mnist.train[:32], config).take(2)
    assert float(train_step(first)) == pytest.approx(1)
    assert float(train_step(second)) < 0.9


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("clean, denoised, *, noise_levels", ["'noise_levels'", "did you mean 'noise_level'?", *INPUTS]),
        ("clean, denoised, *, nothing_like_it", ["'nothing_like_it'", *INPUTS]),
        ("*, clean", ["unknown input 'clean'"]),
        ("clean, denoised, noisy", ["got (clean, denoised, noisy)", "write * before noisy"]),
        ("clean, denoised, latents, noisy", ["write * before latents"]),
        ("clean, denoised, third", ["expected (clean, denoised)", "got (clean, denoised, third)"]),
        ("clean", ["expected (clean, denoised), (denoised) or no positional", "got (clean)"]),
        ("noisy", ["got (noisy)"]),
    ],
)
def test_wrong_signatures_are_rejected_in_one_line(signature, words, tmp_path):
    (tmp_path / "mine.py").write_text(f"def mine({signature}): ...\n")
    with rejected(f"--loss: {tmp_path}/mine.py:mine: ", *words):
        composite.build(f"{tmp_path}/mine.py:mine")


@pytest.mark.parametrize(
    ("signature", "takes_clean", "declared"),
    [
        ("clean, denoised", True, set()),
        ("y_true, y_pred, *, step", True, {"step"}),
        ("denoised", False, set()),
        ("denoised, *, progress", False, {"progress"}),
        ("", False, set()),
        ("*, noisy, denoise", False, {"noisy", "denoise"}),
    ],
)
def test_allowed_signatures_say_what_a_loss_sees(signature, takes_clean, declared, tmp_path):
    (tmp_path / "mine.py").write_text(f"def mine({signature}): ...\n")
    (term,) = composite.build(f"{tmp_path}/mine.py:mine").terms
    assert (term.sees_clean, term.inputs) == (takes_clean, declared)


def test_update_and_call_can_declare_different_inputs(tmp_path):
    source = "import keras\nclass Mine(keras.Layer):\n    def call(self, denoised, *, step): ...\n"
    (tmp_path / "mine.py").write_text(source + "    def update(self, clean, denoised, *, noisy): ...\n")
    (term,) = composite.build(f"{tmp_path}/mine.py:Mine").terms
    assert term.inputs == {"step", "noisy"}
    assert not term.sees_clean
    (tmp_path / "mine.py").write_text(source + "    def update(self, clean): ...\n")
    with pytest.raises(UsageError, match=r"mine\.py:Mine: expected .*got \(clean\)"):
        composite.build(f"{tmp_path}/mine.py:Mine")


@pytest.mark.parametrize(
    ("loss", "steps", "expected"),
    [
        ("mae", 200, True),
        ("mae", 0, False),
        ("bce", 200, False),
        ("2*bce", 200, False),
        ("bce + 0.1*ssim", 200, True),
        ("mae + 0.1*total_variation", 200, True),
        ("total_variation + sparse_latents", 200, False),
        ("noise2noise", 200, False),
        ("noise2void", 200, False),
        ("sure + 0.1*contractive", 200, False),
        (loss_of(lambda clean, denoised: denoised), 200, True),
        (loss_of(lambda denoised: denoised), 200, False),
    ],
)
def test_only_a_loss_that_sees_clean_images_warms_up(loss, steps, expected):
    config = replace(TINY, bce_steps=steps)
    assert objective(loss, config).warms_up is expected
    assert not objective(loss, replace(config, start_from="a.keras")).warms_up


def test_the_weight_of_bce_falls_linearly_from_1_to_0(batch):
    """BCE, with the scale of the loss, has the value of the loss; only the gradient tells them apart."""
    step, denoised = tf.Variable(0, dtype=tf.int64), 0.1 + 0.8 * batch.noisy[::-1]
    made = objective("mae", replace(TINY, bce_steps=200), step)

    @tf.function
    def gradient_and_values() -> tuple[tf.Tensor, ...]:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(denoised)
            minimized, means = made(lambda images: Outputs(denoised, None), batch)
            bce = tf.reduce_mean(LOSSES["bce"](batch.clean, denoised))
            mae = tf.reduce_mean(LOSSES["mae"](batch.clean, denoised))
        gradients = [tape.gradient(value, denoised) for value in (minimized, mae, bce)]
        return *gradients, minimized, means["loss"], mae, bce

    for done, weight in ((0, 1.0), (50, 0.75), (100, 0.5), (199, 0.005), (200, 0.0), (1000, 0.0)):
        step.assign(done)
        of_minimized, of_mae, of_bce, minimized, loss, mae, bce = gradient_and_values()
        expected = weight * float(mae / bce) * of_bce + (1 - weight) * of_mae
        np.testing.assert_allclose(of_minimized, expected, atol=1e-4 * np.abs(expected).max())
        assert float(minimized) == pytest.approx(float(mae), rel=1e-5)
        assert float(loss) == float(mae)
