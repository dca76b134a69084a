"""A warning before a run that probably needs more memory than there is."""

import pytest

from dae.config import RunConfig
from dae.models import networks
from dae.training import memory


@pytest.mark.parametrize(("width", "batch_size", "warns"), [(1, 128, False), (256, 50_000, True)])
def test_a_batch_that_is_too_large_has_a_warning_of_one_line(width, batch_size, warns, capsys):
    model = networks.sketch(RunConfig(model="dncnn", width=width), (28, 28, 1))  # without values, which need memory
    assert model is not None
    memory.warn_if_scarce(model, batch_size)
    captured = capsys.readouterr()
    start = "warning: --batch-size, --patch-size: a step with 50000 images of 28 x 28 needs about "
    assert (captured.out, captured.err.count("\n")) == ("", int(warns))
    assert captured.err.startswith(start if warns else "")
