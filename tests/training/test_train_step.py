import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.data.pipeline import training_batches
from dae.losses import losses
from dae.models import networks
from dae.optimizers import optimizers
from dae.training.checkpoints import Checkpoints
from dae.training.train_step import make_train_step, make_train_steps

STEPS = 50


class RunningLosses(keras.callbacks.Callback):
    """Keras's own mean loss of the epoch so far, after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.values.append(logs["loss"])


def fifty_steps(our_optimizer, their_optimizer, folder, images, wrap=lambda model: model, parts=1):
    """(losses of our steps, running losses of `fit`, (our, their) weights) from the same start on the same batches."""
    config = RunConfig(batch_size=128)
    batches = list(training_batches(images, config).take(STEPS))
    ours, theirs = wrap(networks.build(config, (28, 28, 1))), networks.build(config, (28, 28, 1))
    theirs.set_weights(ours.get_weights())

    state = Checkpoints(folder, ours, our_optimizer).state
    train_step = make_train_step(ours, our_optimizer, losses.load("bce"), state, parts)
    mean_losses = [float(train_step(noisy, clean)) for noisy, clean in batches]
    assert int(state.step) == STEPS
    assert int(state.images) == STEPS * 128
    assert float(state.loss_sums[0]) / float(state.images) == pytest.approx(np.mean(mean_losses), rel=1e-6)

    theirs.compile(their_optimizer, "binary_crossentropy")
    running = RunningLosses()
    noisy, clean = (np.concatenate(part) for part in zip(*batches, strict=True))
    theirs.fit(noisy, clean, batch_size=128, epochs=1, shuffle=False, verbose=0, callbacks=[running])

    np.testing.assert_allclose(np.cumsum(mean_losses) / np.arange(1, STEPS + 1), running.values, rtol=1e-4)
    assert mean_losses[-1] < 0.6 * mean_losses[0]  # they do learn
    return zip(ours.get_weights(), theirs.get_weights(), strict=True)


def unfused(model: keras.Model) -> keras.Model:
    """`model` in a form that is not a chain of plain layers, so that it is trained as it is."""
    image = keras.Input(model.input_shape[1:])
    return keras.Model(image, model(keras.layers.Activation("linear")(image)))


def test_fifty_steps_equal_those_of_keras_compile_and_fit(mnist, tmp_path):
    adams = keras.optimizers.Adam(), keras.optimizers.Adam()
    for mine, keras_own in fifty_steps(*adams, tmp_path, mnist.train, wrap=unfused):
        np.testing.assert_allclose(mine, keras_own, rtol=1e-4, atol=1e-5)


def test_fifty_fused_steps_in_micro_batches_equal_those_of_keras_compile_and_fit(mnist, tmp_path):
    """Weights with SGD: Adam makes much of rounding; with it, `fit` on one thread and on two differ by up to 2e-3."""
    adams = optimizers.build(RunConfig(max_gradient_norm=0.1), STEPS), keras.optimizers.Adam(1e-3, global_clipnorm=0.1)
    fifty_steps(*adams, tmp_path / "adam", mnist.train, parts=2)
    sgds = keras.optimizers.SGD(0.05), keras.optimizers.SGD(0.05)
    for mine, keras_own in fifty_steps(*sgds, tmp_path / "sgd", mnist.train, parts=2):
        np.testing.assert_allclose(mine, keras_own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_many_steps_in_one_call_are_those_steps_one_by_one(optimizer, mnist, tmp_path):
    config, results = RunConfig(batch_size=32, optimizer=optimizer), []
    for counts in ([7, 6], [1] * 13):
        model, adam = networks.build(config, (28, 28, 1)), optimizers.build(config, STEPS)
        state = Checkpoints(tmp_path / str(len(counts)), model, adam).state
        train_steps = make_train_steps(make_train_step(model, adam, losses.load("bce"), state, 2), config.batch_size)
        batches = iter(training_batches(mnist.train, config))
        last = [float(train_steps(batches, tf.constant(count))) for count in counts][-1]
        assert int(state.step) == 13
        results.append([last, state.loss_sums.numpy(), next(batches)[0].numpy(), *model.get_weights()])
    for together, alone in zip(*results, strict=True):
        np.testing.assert_array_equal(together, alone)


def test_of_many_steps_the_one_that_is_not_finite_is_known(mnist, tmp_path):
    config = RunConfig(batch_size=32)
    model, adam = networks.build(config, (28, 28, 1)), optimizers.build(config, STEPS)
    state = Checkpoints(tmp_path, model, adam).state
    train_steps = make_train_steps(make_train_step(model, adam, losses.load("bce"), state), config.batch_size)
    numbered = training_batches(mnist.train, config).enumerate(1)
    batches = numbered.map(lambda step, batch: (tf.where(step == 5, float("nan"), batch[0]), batch[1]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(loss|gradient) : Tensor had"):
        train_steps(iter(batches), tf.constant(8))
    assert int(state.step) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused_before_any_weight_changes(bad, tmp_path):
    model = networks.build(RunConfig(), (28, 28, 1))
    optimizer = keras.optimizers.Adam(1e-3)
    state = Checkpoints(tmp_path, model, optimizer).state
    train_step = make_train_step(model, optimizer, losses.load("mse"), state)
    before = model.get_weights()
    images = tf.fill((4, 28, 28, 1), 0.5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="the loss : Tensor had"):
        train_step(images, images * bad)
    assert int(state.step) == 0
    for weights, same in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weights, same)


@pytest.mark.parametrize(("images", "parts"), [(64, 1), (64, 2), (7, 3), (1, 2)])
def test_the_step_moves_the_weights_by_the_gradient_of_the_plain_keras_model(images, parts, mnist, tmp_path):
    """With SGD, since Adam hides a wrong scale; a learning rate of 1 makes the movement the gradient."""
    noisy, clean = next(iter(training_batches(mnist.train, RunConfig(batch_size=images))))
    model = networks.build(RunConfig(), (28, 28, 1))
    before = model.get_weights()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses.LOSSES["mse"](clean, model(noisy)))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer = keras.optimizers.SGD(1.0)
    state = Checkpoints(tmp_path, model, optimizer).state
    assert float(make_train_step(model, optimizer, losses.load("mse"), state, parts)(noisy, clean)) == pytest.approx(
        float(loss), rel=1e-6
    )
    for old, new, gradient in zip(before, model.get_weights(), gradients, strict=True):
        # The movement is a difference of float32 weights of up to 1, so it has their rounding.
        np.testing.assert_allclose(old - new, gradient, atol=1e-4 * np.abs(gradient).max() + 1e-7)
