import re

import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st

from dae.errors import UsageError
from dae.losses import expression
from dae.losses.losses import LOSSES

NAMES = st.sampled_from([*LOSSES, "my_losses.py:f", "/a b/c+d/my.py:g", "../x.py:h"])
TERMS = st.lists(
    st.tuples(st.floats(min_value=0, exclude_min=True, allow_infinity=False), NAMES),
    min_size=1,
    unique_by=lambda term: term[1],
)


@given(TERMS)
def test_sum_of_weighted_names_is_parsed_into_its_terms(terms):
    text = "+".join(f" {weight!r} * {name} " for weight, name in terms)
    assert list(expression.parse(text)) == terms
    assert expression.parse(expression.canonical(text)) == expression.parse(text)


@pytest.mark.parametrize("text", ["bce+0.1*ssim", " 1*bce + .1*ssim", "1.0 * bce +1e-1*ssim "])
def test_all_spellings_have_one_canonical_form(text):
    assert expression.canonical(text) == "bce + 0.1*ssim"


@fuzz
@given(st.text() | st.text("bce +*.019e-:/py"))
def test_any_text_is_parsed_or_rejected_in_one_line(text):
    try:
        assert expression.parse(text)
    except UsageError as error:
        assert str(error).startswith("--loss: ")
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("bce +* ssim", "* ssim"),
        ("bce +", ""),
        ("bce ssim", "bce ssim"),
        ("", ""),
        ("bce - ssim", "bce - ssim"),
        ("-1*bce", "-1*bce"),
        ("__import__('os').abort()", "__import__('os').abort()"),
    ],
)
def test_invalid_expression_is_rejected_with_its_position(text, position):
    message = f"--loss: invalid expression {text!r} at {position!r}; expected terms NAME or WEIGHT*NAME, joined by +"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        expression.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0*bce", "weight of bce .*got 0"),
        ("bce + 1e999*ssim", "weight of ssim .*got 1e999"),
        ("bce + 2*bce", f"bce occurs twice in {re.escape(repr('bce + 2*bce'))}"),
    ],
)
def test_invalid_weight_or_repeated_name_is_rejected(text, message):
    with pytest.raises(UsageError, match=f"^--loss: .*{message}"):
        expression.parse(text)
