import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import batch_of, objective

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import check_fits, compiled_by_shape, make_evaluator
from dae.evaluation.metrics import METRICS, psnr
from dae.replicas import Replicas


@pytest.fixture(scope="module")
def identity() -> keras.Model:
    """A model that returns its input."""
    inputs = keras.Input((28, 28, 1))
    return keras.Model(inputs, keras.layers.Activation("linear")(inputs))


def test_means_are_exact_and_weight_every_image_equally(identity, mnist):
    """50 images in batches of 32, so that the last batch is smaller, and its shards are unequal."""
    clean = (mnist.test.pixels[:50] / 255).astype(np.float32)
    denoised = np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape), 0, 1).astype(np.float32)
    batches = [batch_of(denoised[part], clean[part]) for part in (slice(32), slice(32, 50))]
    evaluate = make_evaluator(identity, objective("mse + 0.5*mae"), replicas=Replicas(shards=4))
    means = {name.removeprefix("test_"): mean for name, mean in evaluate("test", batches).items()}
    assert set(means) == {"loss", "loss_mse", "loss_mae", *METRICS}
    assert means["loss_mse"] == means["mse"]
    for name, function in METRICS.items():
        values = np.asarray(function(tf.constant(clean), tf.constant(denoised)), np.float64)
        assert means[name] == pytest.approx(values.mean(), rel=1e-6), name
    errors = (clean - denoised).astype(np.float64)
    assert means["loss"] == pytest.approx((errors**2).mean() + 0.5 * np.abs(errors).mean(), rel=1e-5)


def test_there_are_no_means_without_images(identity):
    assert make_evaluator(identity)("test", []) == {}


def test_a_set_is_evaluated_with_the_metrics_that_are_given_under_its_name(identity, mnist):
    config = RunConfig(noise_level=0.2, seed=3)
    batches = evaluation_batches(mnist.test[:20], config, "test")
    assert set(make_evaluator(identity)("test", batches)) == {f"test_{name}" for name in METRICS}
    (batch,) = batches
    expected = float(tf.reduce_mean(psnr(batch.clean, batch.noisy)))
    assert make_evaluator(identity, metrics={"mine": METRICS["psnr"]})("x", batches) == {
        "x_mine": pytest.approx(expected, rel=1e-6)
    }


def test_images_that_the_model_does_not_take_are_rejected(identity, mnist):
    noisy = keras.Input((28, 28, 1))
    pixels = keras.layers.Dense(28 * 28, "sigmoid")(keras.layers.Flatten()(noisy))
    dense = keras.Model(noisy, keras.layers.Reshape((28, 28, 1))(pixels))
    tall, colour = Images(mnist.test.pixels[:9].repeat(2, axis=1)), Images(mnist.test.pixels[:9].repeat(3, axis=3))
    for model in (identity, dense):
        check_fits(model, mnist.test)
        with pytest.raises(UsageError, match=r"^--data: the model takes images of 1 channels, not of 3; --grey"):
            check_fits(model, colour)
    check_fits(identity, tall)
    with pytest.raises(UsageError, match=r"^--data: the model takes images of \(28, 28, 1\), not of 56 x 28$"):
        check_fits(dense, tall)


def test_graphs_of_the_last_32_sizes_are_kept():
    traced = []

    def total(images: tf.Tensor) -> tf.Tensor:
        traced.append(images.shape[1])
        return tf.reduce_sum(images)

    compiled = compiled_by_shape(total)
    for side in (*range(1, 35), 34, 3, 2):
        assert compiled(tf.ones([1, side, side, 1])) == side**2
    assert traced == [*range(1, 35), 2]
