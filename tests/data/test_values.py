"""Tests of value ranges: which images they apply to, and which images cannot be in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dae.data import values
from dae.data.values import ValueRange
from dae.errors import UsageError

UNIT = ValueRange.requested(None, np.float32)


@pytest.mark.parametrize(
    ("given_for", "dtype", "expected"),
    [
        (("uint16", 0, 4095), np.uint16, (0, 4095)),
        (("uint16", 0, 4095), ">u2", (0, 4095)),
        (("uint16", 0, 4095), np.uint8, (0, 255)),
        (("uint16", 0, 4095), np.float32, (0, 1)),
        (("float32", -1, 1), np.float64, (-1, 1)),
        (("float32", -1, 1), np.uint8, (0, 255)),
        (("float32", -1, 1), np.uint16, (0, 65535)),
        (("int16", -1000, 2000), np.int16, (-1000, 2000)),
    ],
)
def test_a_value_range_applies_to_the_type_it_was_given_for(given_for, dtype, expected):
    name, black, white = given_for
    found = ValueRange(black, white, name).of(np.dtype(dtype))
    assert (found.black, found.white, found.dtype) == (*expected, np.dtype(dtype).name)


@pytest.mark.parametrize("dtype", [np.int16, np.int8, np.int64, np.uint32, np.bool_])
def test_other_types_have_no_usual_range(dtype):
    with pytest.raises(UsageError, match=r"^expected uint8, uint16, or floats .* --value-range"):
        ValueRange(0, 1, "float32").of(np.dtype(dtype))


@pytest.mark.parametrize("ends", [(1, 0), (0, 0), (0, np.inf), (np.nan, 1)])
def test_an_empty_or_infinite_range_is_rejected(ends):
    with pytest.raises(UsageError, match="two finite numbers in ascending order"):
        ValueRange.requested(ends, np.float32)


@given(st.integers(-(2**15), 2**15 - 2), st.integers(1, 2**16 - 1), st.lists(st.integers(-(2**15), 2**15 - 1)))
def test_integers_survive_the_way_to_floats_and_back(black, length, pixels):
    array = np.array(pixels, np.int16)
    value_range = ValueRange(black, black + length, "int16")
    np.testing.assert_array_equal(value_range.from_unit(value_range.to_unit(array), array.dtype), array)


def test_integers_are_rounded_and_clipped_to_their_type():
    found = ValueRange(0, 255, "uint8").from_unit(np.array([-0.5, 0.4999, 1, 2], np.float32), np.dtype(np.uint8))
    np.testing.assert_array_equal(found, [0, 127, 255, 255])


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_noisy_digits_outside_of_their_range_are_accepted(level, mnist):
    digits = mnist.test.pixels[:200] / np.float32(255)
    values.check(digits + np.random.default_rng(0).normal(0, level, digits.shape).astype(np.float32), UNIT)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        (lambda digits: digits * 2 - 1, "-1 1"),
        (lambda digits: digits * 9, "0 9"),
        (lambda digits: digits * 255, "0 255"),
        (lambda digits: digits * 4095, "0 4095"),
        (lambda digits: digits * 3000 - 1000, "-1000 2000"),
    ],
)
@pytest.mark.parametrize("level", [0, 0.1])
def test_images_of_another_range_are_rejected_with_the_flag_that_fits(change, flag, level, mnist):
    digits = mnist.test.pixels[:50] / np.float32(255)
    noise = np.random.default_rng(0).normal(0, level, digits.shape).astype(np.float32)
    images = change((digits + noise).clip(0, 1))
    with pytest.raises(UsageError, match=f"--value-range {flag} fits$"):
        values.check(images, UNIT)
    black, white = map(float, flag.split())
    values.check(images, ValueRange(black, white, "float32"))


def test_one_image_of_another_range_among_many_or_a_value_of_ten_times_the_range_is_rejected(mnist):
    digits = mnist.test.pixels[:200] / np.float32(255)
    digits[17] = digits[17] * 2 - 1
    with pytest.raises(UsageError, match="values from -1 to 1 cannot be those"):
        values.check(digits, UNIT)
    digits = digits[:1]
    digits[0, 5, 5] = 8
    values.check(digits, UNIT)
    digits[0, 5, 5] = 12
    with pytest.raises(UsageError, match="from 0 to 12 cannot"):
        values.check(digits, UNIT)
