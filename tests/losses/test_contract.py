import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, run_in_process

from dae.errors import UsageError
from dae.losses import composite, contract
from dae.losses.composite import CompositeLoss
from dae.losses.losses import LOSSES

HEAD = """
import numpy as np
import tensorflow as tf

def mine(clean, denoised):
"""


@pytest.fixture
def batch(mnist) -> tuple[tf.Tensor, tf.Tensor]:
    """Sixteen clean images, and other grey levels as denoised ones."""
    clean = tf.constant(mnist.train[:16] / np.float32(255))
    return clean, 0.3 * clean + 0.2


def build(body: str, folder: Path) -> CompositeLoss:
    """Return a sum with a user's loss, whose body is given as lines separated by semicolons."""
    (folder / "mine.py").write_text(HEAD + "\n".join("    " + line for line in body.split("; ")) + "\n")
    return composite.build(f"bce + 2*{folder}/mine.py:mine")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return tf.reduce_mean(clean - denoised)", ("float32 [16]", "got float32 []")),
        ("return tf.square(clean - denoised)", ("float32 [16]", "got float32 [16, 28, 28, 1]")),
        ("return tf.reduce_mean(clean - denoised, [1, 2])", ("float32 [16]", "got float32 [16, 1]")),
        ("return tf.cast(tf.reduce_mean(denoised, [1, 2, 3]), tf.float64)", ("float32 [16]", "got float64")),
        ("return 3.0", ("tensor", "got a float")),
        ("pass", ("tensor", "got a NoneType")),
        ("return tf.reduce_mean(denoised, [1, 2, 3]) / 0", ("finite value", "training images", "got inf")),
        ("return tf.reduce_mean(-tf.math.log(denoised), [1, 2, 3])", ("finite value", "only 0 and 1", "got inf")),
        ("return tf.reduce_mean(tf.sqrt(denoised), [1, 2, 3])", ("finite gradient", "only 0 and 1", "got inf")),
        ("return tf.reduce_mean(clean, [1, 2, 3])", ("no gradient",)),
        ("return tf.reduce_mean(tf.round(denoised), [1, 2, 3])", ("no gradient",)),
        ("return tf.constant(denoised.numpy().mean((1, 2, 3)))", ("no gradient",)),
        ("return tf.reduce_mean(denoised * tf.random.uniform([]), [1, 2, 3])", ("graph", "eager mode")),
        (
            "return np.log(1 + tf.executing_eagerly()) + tf.reduce_mean(denoised, [1, 2, 3])",
            ("graph", "eager mode"),
        ),
        ("x = 1; return tf.reduce_mean(denoised, [1, 2, 9])", ("line 7 (InvalidArgumentError: ",)),
        ("raise ValueError('no \\n way')", ("line 6 (ValueError: no)",)),
        ("print(denoised.numpy().max()); return tf.reduce_mean(denoised, [1, 2, 3])", ("line 6 (AttributeError: ",)),
    ],
)
def test_user_loss_that_breaks_the_contract_is_refused_in_one_line(body, words, batch, tmp_path):
    with pytest.raises(UsageError) as caught:
        contract.check(build(body, tmp_path), *batch)
    message = str(caught.value)
    assert message.startswith(f"--loss: {tmp_path}/mine.py:mine: ")
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_user_loss_with_the_wrong_arguments_is_refused(batch, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(clean): ...")
    with pytest.raises(UsageError, match=r"mine\.py:mine: .*TypeError: .*1 positional argument"):
        contract.check(composite.build(f"{tmp_path}/mine.py:mine"), *batch)


@pytest.mark.parametrize("text", [*LOSSES, "bce + 0.1*ssim", f"bce + 0.5*{EXPERIMENTS}/examples/edge_loss.py:edges"])
def test_built_in_losses_and_the_example_keep_the_contract(text, batch, capsys):
    contract.check(composite.build(text), *batch)
    assert capsys.readouterr().err == ""


def test_loss_that_mixes_the_examples_of_a_batch_gives_a_warning(batch, tmp_path, capsys):
    mixing = "each = tf.reduce_mean(tf.square(clean - denoised), [1, 2, 3]); return each / tf.reduce_mean(each)"
    contract.check(build(mixing, tmp_path), *batch)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: --loss: {tmp_path}/mine.py:mine: ")
    assert "depends on the others" in warning


def test_run_refuses_a_broken_loss_before_it_writes_anything(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + "    return tf.reduce_mean(clean - denoised)\n")
    done = run_in_process("run.py", "--loss", "bce + mine.py:mine", "--train-examples", 600, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--loss: {tmp_path}/mine.py:mine: " in done.stderr
    assert "got float32 []" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["mine.py"]
