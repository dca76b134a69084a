import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import EXPERIMENTS, TINY, fuzz, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_summaries import check_curves, events

import dae
from dae.analysis import reproducibility
from dae.errors import UsageError
from dae.losses import contract, expression, losses
from dae.losses.losses import LOSSES, WeightedSum
from dae.training import trainer
from dae.workdir.workdir import read_metrics

# Exact 0 and 1, often: that is where logarithms, roots and quotients end.
IMAGES = arrays(np.float32, (2, 12, 12, 1), elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))
RANGES = {"bce": 16.2, "mse": 1, "mae": 1, "huber": 0.095, "charbonnier": 1.000001, "ssim": 2}


def values_and_gradients(loss, clean, denoised) -> tuple[np.ndarray, np.ndarray]:
    denoised = tf.constant(denoised)
    with tf.GradientTape() as tape:
        tape.watch(denoised)
        values = loss(tf.constant(clean), denoised)
    return values, tape.gradient(values, denoised)


@pytest.mark.parametrize("name", LOSSES)
@given(clean=IMAGES, denoised=IMAGES)
@settings(max_examples=30)
def test_losses_are_per_example_in_their_range_with_finite_gradients(name, clean, denoised):
    values, gradients = values_and_gradients(LOSSES[name], clean, denoised)
    assert values.shape == (2,)
    assert values.dtype == tf.float32
    assert (np.asarray(values) >= -1e-6).all()
    assert (np.asarray(values) <= RANGES[name] * (1 + 1e-5)).all()
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("clean", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("denoised", [0.0, 0.5, 1.0])
def test_losses_of_constant_images_are_finite_and_least_where_they_are_equal(name, clean, denoised):
    images = [np.full((1, 28, 28, 1), value, np.float32) for value in (clean, denoised)]
    values, gradients = values_and_gradients(LOSSES[name], *images)
    least, _ = values_and_gradients(LOSSES[name], images[0], images[0])
    assert np.isfinite(gradients).all()
    assert values >= least if clean != denoised else values == least


NAMES = st.sampled_from([*LOSSES, "my_losses.py:f", "/a b/c+d/my.py:g", "../x.py:h"])
SUMS = st.lists(
    st.tuples(st.floats(min_value=0, exclude_min=True, allow_infinity=False), NAMES),
    min_size=1,
    unique_by=lambda term: term[1],
)


@given(SUMS)
def test_a_sum_is_parsed_as_it_was_written(terms):
    text = "+".join(f" {weight!r} * {name} " for weight, name in terms)
    assert list(expression.parse(text)) == terms
    assert expression.parse(expression.canonical(text)) == expression.parse(text)


@pytest.mark.parametrize("text", ["bce+0.1*ssim", " 1*bce + .1*ssim", "1.0 * bce +1e-1*ssim "])
def test_every_spelling_of_a_sum_is_the_same(text):
    assert expression.canonical(text) == "bce + 0.1*ssim"


@fuzz
@given(st.text() | st.text("bce +*.019e-:/py"))
def test_any_text_is_a_sum_or_refused_in_one_line(text):
    try:
        assert expression.parse(text)
    except UsageError as error:
        assert str(error).startswith("--loss: ")
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bce +* ssim", "--loss: cannot read 'bce +* ssim' at '* ssim'; did you mean 'bce + ssim'?; it is to be"),
        ("bce ssim", "--loss: cannot read 'bce ssim' at 'bce ssim'; it is to be one or more terms NAME or NUMBER*NAME"),
        ("bce +", "--loss: cannot read 'bce +' at ''; did you mean 'bce'?"),
        ("", "--loss: cannot read '' at ''; it is"),
        ("bce - ssim", "--loss: cannot read 'bce - ssim' at 'bce - ssim'"),
        ("-1*bce", "--loss: cannot read '-1*bce' at '-1*bce'"),
        ("0*bce", "--loss: the weight 0 of bce is not a finite number above 0"),
        ("bce + 1e999*ssim", "--loss: the weight 1e999 of ssim is not a finite"),
        ("bce + 2*bce", "--loss: 'bce + 2*bce' has bce twice; give it one weight"),
        ("bce + 0.1*sism", "--loss: unknown name 'sism'; did you mean 'ssim'? (known: bce, mse, "),
        ("__import__('os').abort()", "--loss: cannot read "),
    ],
)
def test_a_slip_gets_one_clear_line_with_the_place_and_the_nearest_name(text, message):
    with pytest.raises(UsageError, match="^" + re.escape(message)) as caught:
        losses.load(text)
    assert "\n" not in str(caught.value)


def test_a_sum_is_the_weighted_sum_of_its_terms_and_gives_each(mnist):
    clean, denoised = (tf.constant(images / np.float32(255)) for images in (mnist.test[:4], mnist.test[4:8]))
    values = losses.load("2*mae + 0.1*ssim + bce")(clean, denoised)
    assert list(values) == ["loss", "loss_mae", "loss_ssim", "loss_bce"]
    mae, ssim, bce = (LOSSES[name](clean, denoised).numpy() for name in ("mae", "ssim", "bce"))
    for name, expected in {"loss": 2 * mae + 0.1 * ssim + bce, "loss_mae": mae, "loss_ssim": ssim}.items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-6)
    assert list(losses.load("2*mae")(clean, denoised)) == ["loss"]


def test_terms_of_one_name_have_curves_of_their_own(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("def bce(clean, denoised): ...\ndef total(clean, denoised): ...\n")
    names = losses.load(f"bce + {tmp_path}/a.py:bce + {tmp_path}/b.py:bce + {tmp_path}/b.py:total").names
    assert names == ("loss", "loss_bce", "loss_bce_2", "loss_bce_3", "loss_total_2")


SUM = replace(TINY, epochs=2, loss="bce + 0.1*ssim", checkpoint_every=4)


@pytest.fixture(scope="module")
def sum_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sum"
    trainer.train(SUM, folder)
    return folder


def test_each_term_has_a_curve_beside_the_total(sum_run):
    for line in read_metrics(sum_run):
        for part in ("train", "validation"):
            terms = line[f"{part}_loss_bce"] + 0.1 * line[f"{part}_loss_ssim"]
            assert line[f"{part}_loss"] == pytest.approx(terms, rel=1e-5)
        assert line["validation_loss_bce"] == pytest.approx(line["validation_bce"], rel=1e-6)
        assert line["validation_loss_ssim"] == pytest.approx(1 - line["validation_ssim"], rel=1e-5)
    report = json.loads((sum_run / "report.json").read_text())
    assert report["test_loss"] == pytest.approx(report["test_loss_bce"] + 0.1 * report["test_loss_ssim"], rel=1e-5)
    check_curves(sum_run)
    for name in ("train", "validation"):
        assert {"loss/total", "loss/bce", "loss/ssim"} <= set(events(sum_run / "tensorboard" / name).Tags()["tensors"])


def test_a_resume_in_the_middle_of_an_epoch_goes_on_with_the_sums_of_the_terms(sum_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sum_run, folder)
    (folder / "report.json").unlink()
    for path in (folder / "checkpoints" / "newest").glob("ckpt-20.*"):
        path.unlink()  # as if killed after step 16, in the middle of epoch 2
    done = run_here("run.py", "--loss", "1*bce+.1 * ssim", "--resume", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "after step 16" in done.stdout
    assert reproducibility.first_difference(folder, sum_run) is None


def my_loss(clean, denoised):
    return tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])


def test_a_function_given_from_python_is_recorded_and_asked_for_again(tmp_path):
    def edited(clean, denoised):
        return 2 * my_loss(clean, denoised)

    edited.__name__ = "my_loss"
    config = replace(TINY, epochs=1)
    report = dae.train(config, tmp_path / "run", loss=my_loss)
    assert report["test_loss"] == pytest.approx(report["test_mse"], rel=1e-6)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss"].startswith("python:my_loss@")
    assert (tmp_path / "run" / "code" / "my_loss.py").read_text().startswith("def my_loss(clean, denoised):\n")
    two = replace(config, epochs=2)
    with pytest.raises(UsageError, match="another run"):
        dae.train(two, tmp_path / "run", loss=edited, resume=True)
    done = run_here("run.py", "--run-dir", tmp_path / "run", "--resume", "--epochs", 2)
    assert done.returncode == 2
    assert "--loss: my_loss was a Python function; give it again: dae.train(config, loss=my_loss)" in done.stderr
    dae.train(two, tmp_path / "run", loss=my_loss, resume=True)
    dae.train(replace(two, loss="mse"), tmp_path / "mse")
    for line, same in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "mse"), strict=True):
        assert line["validation_mse"] == pytest.approx(same["validation_mse"], rel=1e-5)
    done = run_here("evaluate.py", tmp_path / "run")
    assert (done.returncode, "PSNR" in done.stdout) == (0, True)


HEAD = """
import numpy as np
import tensorflow as tf

def mine(clean, denoised):
"""


@pytest.fixture
def batch(mnist) -> tuple[tf.Tensor, tf.Tensor]:
    clean = tf.constant(mnist.train[:16] / np.float32(255))
    return clean, 0.3 * clean + 0.2


def load(body: str, folder: Path) -> WeightedSum:
    (folder / "mine.py").write_text(HEAD + "\n".join("    " + line for line in body.split("; ")) + "\n")
    return losses.load(f"bce + 2*{folder}/mine.py:mine")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return tf.reduce_mean(clean - denoised)",
            r"returns float32 [] for 16 images, not one number each, float32 [16]",
        ),
        ("return tf.square(clean - denoised)", "returns float32 [16, 28, 28, 1] for 16 images"),
        ("return tf.reduce_mean(clean - denoised, [1, 2])", "returns float32 [16, 1] for 16 images"),
        ("return tf.cast(tf.reduce_mean(denoised, [1, 2, 3]), tf.float64)", "returns float64 [16]"),
        ("return 3.0", "returns a float, not a tensor"),
        ("pass", "returns a NoneType, not a tensor"),
        ("return tf.reduce_mean(denoised, [1, 2, 3]) / 0", "is inf for a batch of training images, which is not"),
        ("return tf.reduce_mean(-tf.math.log(denoised), [1, 2, 3])", "is inf for images whose pixels are all 0 or 1"),
        ("return tf.reduce_mean(tf.sqrt(denoised), [1, 2, 3])", "has a gradient of inf for images whose pixels are"),
        ("return tf.reduce_mean(clean, [1, 2, 3])", "has no gradient"),
        ("return tf.reduce_mean(tf.round(denoised), [1, 2, 3])", "has no gradient"),
        ("return tf.constant(denoised.numpy().mean((1, 2, 3)))", "has no gradient"),
        ("return tf.reduce_mean(denoised * tf.random.uniform([]), [1, 2, 3])", "in a graph, but"),
        ("return np.log(1 + tf.executing_eagerly()) + tf.reduce_mean(denoised, [1, 2, 3])", "in a graph, but"),
        ("x = 1; return tf.reduce_mean(denoised, [1, 2, 9])", "fails in line 7 (InvalidArgumentError: "),
        ("raise ValueError('no \\n way')", "fails in line 6 (ValueError: no)"),
        (
            "print(denoised.numpy().max()); return tf.reduce_mean(denoised, [1, 2, 3])",
            "fails in line 6 (AttributeError: ",
        ),
    ],
)
def test_what_is_no_loss_is_refused_by_file_and_function_in_one_line(body, message, batch, tmp_path):
    with pytest.raises(UsageError) as caught:
        contract.check(load(body, tmp_path), *batch)
    assert str(caught.value).startswith(f"--loss: {tmp_path}/mine.py:mine: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_with_the_wrong_arguments_is_refused(batch, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(clean): ...")
    with pytest.raises(UsageError, match=r"mine.py:mine: fails .TypeError: .*takes 1 positional argument"):
        contract.check(losses.load(f"{tmp_path}/mine.py:mine"), *batch)


@pytest.mark.parametrize("text", [*LOSSES, "bce + 0.1*ssim", f"bce + 0.5*{EXPERIMENTS}/examples/edge_loss.py:edges"])
def test_the_losses_that_ship_and_the_example_keep_the_contract(text, batch, capsys):
    contract.check(losses.load(text), *batch)
    assert capsys.readouterr().err == ""


def test_a_loss_that_mixes_the_examples_of_a_batch_is_warned_of(batch, tmp_path, capsys):
    mixing = "each = tf.reduce_mean(tf.square(clean - denoised), [1, 2, 3]); return each / tf.reduce_mean(each)"
    contract.check(load(mixing, tmp_path), *batch)
    assert (
        f"warning: --loss: {tmp_path}/mine.py:mine: one example's loss depends on the others" in capsys.readouterr().err
    )


def test_a_mistake_in_a_loss_is_found_by_a_run_before_it_writes_anything(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + "    return tf.reduce_mean(clean - denoised)\n")
    done = run_here("run.py", "--loss", "bce + mine.py:mine", "--train-examples", 600, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--loss: {tmp_path}/mine.py:mine: returns float32 []" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["mine.py"]
