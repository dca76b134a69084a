import pytest
import tensorflow as tf

from dae.errors import first_line


def test_an_exception_is_said_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == first_line(EOFError("\n")) == "EOFError"


def test_of_an_error_in_a_graph_the_line_says_what_went_wrong():
    def fail():
        raise ValueError("no such noise")

    @tf.function
    def graph():
        return tf.py_function(fail, [], tf.float32)

    with pytest.raises(tf.errors.OpError) as error:
        graph()
    assert str(error.value).startswith("Graph execution error:")
    assert "ValueError: no such noise" in first_line(error.value)
