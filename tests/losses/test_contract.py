from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import EXPERIMENTS, objective, rejected, small_network

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import training_batches
from dae.losses import contract
from dae.losses.losses import LOSSES, SELF_SUPERVISED
from dae.seeding import keras_seed

HEAD = """
import numpy as np
import tensorflow as tf

def mine(clean, denoised):
"""


CONFIG = RunConfig(batch_size=16, clip_noise=False, initial_brightness=0.13)


@pytest.fixture(scope="module")
def check(mnist) -> Callable[[str], None]:
    """A function that checks a loss with sixteen training images and the initial network."""
    images = Images(mnist.train.pixels[:64, 8:20, 8:20])
    (batch,) = training_batches(images, CONFIG).take(1)
    with keras_seed(0):
        model = small_network(images.image_shape)
    return lambda loss: contract.check(objective(loss, CONFIG), model, batch)


def write(body: str, folder: Path) -> str:
    """Return a sum with a new user's loss, whose body is given as lines separated by semicolons."""
    (folder / "mine.py").write_text(HEAD + "\n".join("    " + line for line in body.split("; ")) + "\n")
    return f"bce + 2*{folder}/mine.py:mine"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return tf.reduce_mean(clean - denoised)", ("float32 [16]", "got float32 []")),
        (
            "return tf.square(clean - denoised)",
            ("float32 [16]", "got float32 [16, 12, 12, 1]", "; take the mean over axis=[1, 2, 3]"),
        ),
        ("return tf.cast(tf.reduce_mean(denoised, [1, 2, 3]), tf.float64)", ("float32 [16]", "got float64")),
        ("pass", ("tensor", "got a NoneType")),
        ("return tf.reduce_mean(denoised, [1, 2, 3]) / 0", ("finite value", "training images", "got inf")),
        ("return tf.reduce_mean(-tf.math.log(denoised), [1, 2, 3])", ("finite value", "only 0 and 1", "got inf")),
        ("return tf.reduce_mean(tf.sqrt(denoised), [1, 2, 3])", ("finite gradient", "only 0 and 1", "got inf")),
        ("return tf.reduce_mean(clean, [1, 2, 3])", ("no gradient",)),
        ("return tf.constant(denoised.numpy().mean((1, 2, 3)))", ("no gradient",)),
        ("return tf.reduce_mean(denoised * tf.random.uniform([]), [1, 2, 3])", ("differs between two calls",)),
        ("return tf.executing_eagerly() + tf.reduce_mean(denoised, [1, 2, 3])", ("a graph and in eager mode",)),
        ("x = 1; return tf.reduce_mean(denoised, [1, 2, 9])", ("line 7 (InvalidArgumentError: ",)),
        ("raise ValueError('no \\n way')", ("line 6 (ValueError: no)",)),
        ("print(denoised.numpy().max()); return tf.reduce_mean(denoised, [1, 2, 3])", ("line 6 (AttributeError: ",)),
    ],
)
def test_user_loss_that_breaks_the_contract_is_rejected_in_one_line(body, words, check, tmp_path):
    with rejected(f"--loss: {tmp_path}/mine.py:mine: ", *words):
        check(write(body, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        " + ".join(name for name in LOSSES if name not in ("ms_ssim", *SELF_SUPERVISED)),  # one is for larger images
        *SELF_SUPERVISED,
        f"bce + 0.5*{EXPERIMENTS}/examples/bright_loss.py:bright_mse",
    ],
)
def test_built_in_losses_and_the_example_keep_the_contract(text, check, monkeypatch, capsys):
    monkeypatch.setattr(contract, "LOSSES", {})  # so that built-in losses are checked as those of users
    check(text)
    assert capsys.readouterr().err == ""


def test_loss_that_mixes_the_examples_of_a_batch_gives_a_warning(check, tmp_path, capsys):
    mixing = "errors = tf.reduce_mean(tf.square(clean - denoised), [1, 2, 3]); return errors / tf.reduce_mean(errors)"
    check(write(mixing, tmp_path))
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: --loss: {tmp_path}/mine.py:mine: ")
    assert "depends on the others" in warning
