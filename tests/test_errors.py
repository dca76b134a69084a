from dae.errors import first_line


def test_an_exception_is_said_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == first_line(EOFError("\n")) == "EOFError"
