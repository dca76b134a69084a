"""Tests of sums of losses and the names of their terms."""

import numpy as np
import pytest
import tensorflow as tf

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


def test_terms_of_the_same_name_are_numbered(tmp_path):
    for file in ("a.py", "b.py"):
        (tmp_path / file).write_text("def bce(clean, denoised): ...\ndef total(clean, denoised): ...\n")
    names = composite.build(f"bce + {tmp_path}/a.py:bce + {tmp_path}/b.py:bce + {tmp_path}/b.py:total").names
    assert names == ("loss", "loss_bce", "loss_bce_2", "loss_bce_3", "loss_total_2")
