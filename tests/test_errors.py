from hypothesis import given
from hypothesis import strategies as st

from dae.errors import distinct, first_line

NAMES = st.lists(st.sampled_from(["a", "b", "a-2", "a-3"]))


@given(NAMES)
def test_names_are_made_distinct_and_first_ones_stay_as_they_are(names):
    made = distinct(names)
    assert len(set(made)) == len(names)
    assert all(one.startswith(name) for one, name in zip(made, names, strict=True))
    if len(set(names)) == len(names):
        assert made == names


def test_an_exception_is_said_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == first_line(EOFError("\n")) == "EOFError"
