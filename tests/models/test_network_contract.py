"""A user's network is checked before a run writes anything; the network in docs/networks.md trains."""

import re
from pathlib import Path

import pytest
import tensorflow as tf
from helpers import rejected, run_in_process
from runs import config_of

from dae.config import RunConfig
from dae.errors import UsageError
from dae.models import networks
from dae.training import trainer

ROOT = Path(__file__).parent.parent.parent

NETWORKS = """
import keras
import numpy as np
from keras import layers


def convolution(x, activation="sigmoid", **settings):
    return layers.Conv2D(1, 3, padding="same", activation=activation, **settings)(x)


def two_inputs(image_shape):
    noisy, other = keras.Input(image_shape), keras.Input(image_shape)
    return keras.Model([noisy, other], convolution(layers.Add()([noisy, other])))


def unchanged_at_first(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, noisy - convolution(noisy, "linear", kernel_initializer="zeros"))


def not_finite(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, convolution(noisy, kernel_initializer=keras.initializers.Constant(float("nan"))))


def without_gradient(image_shape):
    noisy = keras.Input(image_shape)
    steps = layers.Discretization([0.0])(layers.Conv2D(1, 3, padding="same", name="lost")(noisy))
    return keras.Model(noisy, convolution(layers.Rescaling(1.0)(steps)))


def numpy_weights(image_shape):
    noisy = keras.Input(image_shape)
    model = keras.Model(noisy, convolution(noisy, name="drawn"))
    model.set_weights([np.random.default_rng().normal(size=weight.shape) for weight in model.get_weights()])
    return model


KEPT = []


def same_network(image_shape):
    noisy = keras.Input(image_shape)
    KEPT.append(keras.Model(noisy, convolution(noisy)))
    return KEPT[0]


class Residual(layers.Layer):
    def __init__(self):
        super().__init__()
        self.convolution = layers.Conv2D(1, 3, padding="same")

    def call(self, x):
        return keras.ops.leaky_relu(x + self.convolution(x), 0.9)


def other_in_graphs(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, convolution(Residual()(noisy)))


class Unsaved(layers.Layer):
    def __init__(self):
        super().__init__()
        self.convolution = layers.Conv2D(1, 3, padding="same")

    def call(self, x):
        return self.convolution(x)

    def save_own_variables(self, store):
        raise OSError("not here")


def unsaved(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, layers.Activation("sigmoid")(Unsaved()(noisy)))


def frozen(image_shape):
    noisy = keras.Input(image_shape)
    model = keras.Model(noisy, convolution(noisy))
    model.trainable = False
    return model


class IfNetwork(keras.Model):
    def call(self, noisy):
        return noisy if keras.ops.mean(noisy) > 0 else -noisy


def branching(image_shape):
    return IfNetwork()


def gated(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, noisy + 2 * convolution(noisy) - 1)


def deep(image_shape):
    noisy = x = keras.Input(image_shape)
    for _ in range(32):
        x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    return keras.Model(noisy, Sum()([layers.Activation("sigmoid")(convolution(x, "linear"))]))


class Sum(layers.Layer):
    def call(self, values):
        return sum(values)


def another_shape(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, convolution(layers.MaxPooling2D()(noisy)))


def layer_class(image_shape):
    return layers.Dense


def fails(image_shape):
    noisy = keras.Input(image_shape)
    return keras.Model(noisy, layers.Add()([noisy, 1]).none)
"""
FAILING_LINE = 1 + NETWORKS.splitlines().index("    return keras.Model(noisy, layers.Add()([noisy, 1]).none)")


@pytest.fixture
def networks_file(tmp_path) -> Path:
    file = tmp_path / "networks.py"
    file.write_text(NETWORKS)
    return file


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("two_inputs", ["2 inputs; instead of taking the noise level", "--noise-level LOW HIGH"]),
        ("another_shape", ["from images (None, 16, 16, 1) to the same shape", "to (None, 8, 8, 1)"]),
        ("layer_class", ["expected a keras.Model or keras.Layer, got <class "]),
        ("not_finite", ["finite values", "nan"]),
        ("without_gradient", ["no gradient", "lost/kernel"]),
        ("numpy_weights", ["drawn/kernel", "Keras's initializers"]),
        ("same_network", ["the same weights", "build a new network"]),
        ("unsaved", ["cannot be saved (not here)"]),
        ("frozen", ["has no weights to train"]),
        ("branching", ["fails in line 88 (", "IfNetwork.call()"]),
        ("other_in_graphs", ["outputs in a TensorFlow graph differ by 0.", "LeakyReLU"]),
        ("fails", [f"fails in line {FAILING_LINE} ("]),
    ],
)
def test_network_that_breaks_the_contract_is_rejected_before_anything_is_written(function, words, networks_file, files):
    runs = networks_file.parent / "runs"
    with rejected(f"--model: {networks_file}:{function}: ", *words):
        trainer.train(config_of(files, model=f"{networks_file}:{function}"), runs / "run")
    assert not runs.exists()


@pytest.mark.parametrize(("name", "loss"), [("unchanged_at_first", "bce"), ("gated", "0.5*bce + mse")])
def test_bce_of_a_network_whose_outputs_may_leave_its_domain_later_is_rejected(name, loss, networks_file, files):
    config = config_of(files, model=f"{networks_file}:{name}", loss=loss)
    words = f"is defined for outputs in .*{name} can leave; use --loss mse or charbonnier"
    with pytest.raises(UsageError, match=rf"^--loss: {re.escape(config.loss)} {words}"):
        trainer.train(config, networks_file.parent / "run")


def test_a_deep_network_that_ends_in_a_sigmoid_within_a_layer_is_bounded(networks_file):
    config, noisy = RunConfig(model=f"{networks_file}:deep"), tf.random.stateless_uniform([2, 12, 12, 1], (1, 2))
    assert networks.is_bounded(config, networks.build(config, (12, 12, 1)), noisy)


@pytest.mark.slow
def test_docs_example_of_a_network_and_a_metric_trains(files, tmp_path):
    page = (ROOT / "docs" / "networks.md").read_text()
    network, metric = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", page, re.DOTALL)
    example = (ROOT / "experiments" / "examples" / "residual_network.py").read_text()
    without_docstring = re.sub(r'\n    """.*?"""', "", example)
    assert without_docstring.endswith(network[1].strip("\n") + "\n")
    for name, code in (network, metric):
        (tmp_path / name).write_text(code)
    plugins = ("--model", f"{network[0]}:residual_network", "--metrics", f"{metric[0]}:largest_error")
    small = ("--data", files / "digits.npz", "--bce-steps", 1, "--epochs", 1, "--quiet", "--run-dir", "run")
    done = run_in_process("run.py", *plugins, "--width", 2, *small, cwd=tmp_path)
    assert done.stderr == ""
    assert '"test_largest_error"' in (tmp_path / "run" / "report.json").read_text()
