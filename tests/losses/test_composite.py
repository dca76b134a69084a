"""Tests of sums of losses, the names of their terms, and the parameters of a loss."""

import re

import numpy as np
import pytest
import tensorflow as tf

from dae.errors import UsageError
from dae.losses import composite
from dae.losses.losses import LOSSES


@pytest.fixture
def images(mnist) -> tuple[tf.Tensor, tf.Tensor]:
    """Clean and denoised images."""
    pixels = mnist.test.pixels[:8] / np.float32(255)
    return tf.constant(pixels[:4]), tf.constant(pixels[4:])


def test_sum_and_its_terms_have_their_values(images):
    values = composite.build("2*mae + 0.1*ssim + bce")(*images)
    assert list(values) == ["loss", "loss_mae", "loss_ssim", "loss_bce"]
    mae, ssim, bce = (LOSSES[name](*images).numpy() for name in ("mae", "ssim", "bce"))
    expected = {"loss": 2 * mae + 0.1 * ssim + bce, "loss_mae": mae, "loss_ssim": ssim, "loss_bce": bce}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6)


def test_single_term_has_only_the_weighted_total(images):
    values = composite.build("2*mae")(*images)
    assert list(values) == ["loss"]
    np.testing.assert_allclose(values["loss"], 2 * LOSSES["mae"](*images).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "inputs"),
    [
        ("clean, denoised", set()),
        ("denoised, *, noisy, step, unknown=1", {"noisy", "step"}),
        ("*, latents", {"latents"}),
    ],
)
def test_a_loss_gets_the_images_and_inputs_that_it_declares(parameters, inputs, tmp_path, images):
    names = re.findall(r"\w+(?=,|$)", parameters.replace("unknown=1", ""))
    (tmp_path / "mine.py").write_text(
        f"def mine({parameters}):\n    return {{{', '.join(map(repr, names))}}}, locals()\n"
    )
    (term,) = composite.build(f"{tmp_path}/mine.py:mine").terms
    assert term.inputs == inputs
    assert term.sees_clean == ("clean" in parameters)
    given = dict.fromkeys(composite.INPUTS, "input")
    clean, denoised = images
    declared, received = term.call(clean, denoised, given)
    expected = {"clean": clean, "denoised": denoised, **given}
    assert declared - {"unknown"} == {name for name in declared if received[name] is expected[name]}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("clean", r"expected \(clean, denoised\), .*got \(clean\)$"),
        ("clean, denoised, noisy", r"expected .*got \(clean, denoised, noisy\); write \* before noisy"),
        ("denoised, *, latent", r"unknown input 'latent'; did you mean 'latents'\? \(known: noisy, "),
    ],
)
def test_parameters_that_no_loss_has_are_rejected_in_one_line(parameters, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"def mine({parameters}): ...")
    with pytest.raises(UsageError, match=rf"^--loss: .*mine\.py:mine: {message}"):
        composite.build(f"{tmp_path}/mine.py:mine")


def test_terms_of_the_same_name_are_numbered(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("def bce(clean, denoised): ...\ndef total(clean, denoised): ...\n")
    names = composite.build(f"bce + {tmp_path}/a.py:bce + {tmp_path}/b.py:bce + {tmp_path}/b.py:total").names
    assert names == ("loss", "loss_bce", "loss_bce_2", "loss_bce_3", "loss_total_2")


def test_unknown_loss_is_rejected_with_the_most_similar_name_and_all_names():
    with pytest.raises(UsageError, match=f"^--loss: .*'sism'.*'ssim'.*{', '.join(LOSSES)}") as caught:
        composite.build("bce + 0.1*sism")
    assert "\n" not in str(caught.value)
