"""experiments/export.py, from the command line."""

import re

import pytest
from helpers import run_in_process

from dae.inference.export import FORMATS

OUTPUTS = [("savedmodel", "denoise"), ("onnx", "denoise.onnx"), ("litert", "denoise.litert")]


@pytest.mark.parametrize(("format_name", "output"), OUTPUTS)
def test_export_says_what_it_wrote_and_checked_and_nothing_else(format_name, output, tiny_run, tmp_path):
    for module in FORMATS[format_name][1]:
        pytest.importorskip(module, reason="needs the extra `export`")
    done = run_in_process("export.py", tiny_run, "--format", format_name, "--output", output, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    written, checked = done.stdout.splitlines()
    size = int(written.removeprefix(f"{output}: ").removesuffix(" bytes").replace(",", ""))
    path = tmp_path / output
    assert size == sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    match = re.fullmatch(r"checked: differs by at most (.*) from the Keras model, on images (.*)", checked)
    assert match, checked
    difference, shapes = match.groups()
    assert 0 <= float(difference) < 1e-5
    assert shapes == "1x28x28x1, 3x28x28x1, 1x36x52x1, 3x36x52x1"
    assert [path.name for path in tmp_path.iterdir()] == [output]
