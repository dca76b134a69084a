import pytest
import tensorflow as tf

from dae.errors import UsageError, as_usage_error, first_line, listed, shown


def test_first_line_is_the_first_line_of_the_message_or_the_type():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == first_line(EOFError("\n")) == "EOFError"


def test_first_line_of_an_error_in_a_graph_is_its_reason():
    def fail():
        raise ValueError("no such noise")

    @tf.function
    def graph():
        return tf.py_function(fail, [], tf.float32)

    with pytest.raises(tf.errors.OpError) as caught:
        graph()
    assert str(caught.value).startswith("Graph execution error:")
    assert "ValueError: no such noise" in first_line(caught.value)


def test_values_in_messages_are_at_most_five_and_of_a_limited_length():
    assert listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed(range(7)) == "0, 1, 2, 3, 4, ..."
    assert shown("a\nb") == r"'a\nb'"
    assert shown([[1], [2]]) == "[[1], [2]]"
    assert len(shown("x" * 1000)) == 203


def test_as_usage_error_converts_only_the_given_kinds():
    with (
        pytest.raises(UsageError, match=r"^x\.npz: cannot be read \(one\)$"),
        as_usage_error("x.npz", "cannot be read", OSError),
    ):
        raise OSError("one\ntwo")
    with pytest.raises(UsageError, match=r"^x\.json: --epochs: 0$"), as_usage_error("x.json"):
        raise UsageError("--epochs: 0")
    with pytest.raises(KeyError), as_usage_error("x.npz", "cannot be read", OSError):
        raise KeyError
