"""experiments/export.py, from the command line."""

import re
import subprocess
import sys

import pytest
from helpers import EXPERIMENTS, run_in_process, run_subprocess

from dae.inference.export import FORMATS

OUTPUTS = [("savedmodel", "denoise"), ("onnx", "denoise.onnx"), ("litert", "denoise.litert")]
RUNS = [(*output, run_in_process) for output in OUTPUTS] + [
    pytest.param(*output, run_subprocess, marks=pytest.mark.slow) for output in OUTPUTS
]


@pytest.mark.parametrize(("format_name", "output", "run_script"), RUNS)
def test_export_says_what_it_wrote_and_checked_and_nothing_else(format_name, output, run_script, tiny_run, tmp_path):
    for module in FORMATS[format_name].modules:
        pytest.importorskip(module, reason="needs the extra `export`")
    done = run_script("export.py", tiny_run, "--format", format_name, "--output", output, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    written, checked = done.stdout.splitlines()
    size = int(written.removeprefix(f"{output}: ").removesuffix(" bytes").replace(",", ""))
    path = tmp_path / output
    assert size == sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    pattern = r"checked with (.*): differs by at most (.*) from the Keras model, on images (.*)"
    match = re.fullmatch(pattern, checked)
    assert match, checked
    runtime, difference, shapes = match.groups()
    assert re.fullmatch(rf"{FORMATS[format_name].runtime} \d+\.\d+\.\d+", runtime)
    assert 0 <= float(difference) < 1e-5
    assert shapes == "1x28x28x1, 3x28x28x1, 1x36x44x1, 3x36x44x1"
    assert [path.name for path in tmp_path.iterdir()] == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text.h5", "--format", "savedmodel", "--output", "out"), "text.h5: not a readable model"),
        (("none", "--format", "savedmodel", "--output", "out"), "none: no such run's folder or model file"),
        (("text.h5", "--output", "out"), "--format"),
    ],
)
def test_mistake_is_one_line_with_status_2_and_writes_nothing(arguments, message, tmp_path):
    (tmp_path / "text.h5").write_text("no model")
    done = run_in_process("export.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.h5"]


WITHOUT_TENSORFLOW = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "tensorflow" not in sys.modules
"""


def test_mistake_in_the_flags_is_reported_before_tensorflow_is_imported(tmp_path):
    arguments = ["run", "--format", "tflite", "--output", "denoise.tflite"]
    program = f"import sys; sys.argv = {[str(EXPERIMENTS / 'export.py'), *arguments]}\n{WITHOUT_TENSORFLOW}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "export.py: --format: unknown name 'tflite'; did you mean 'litert'? (known: onnx, litert, savedmodel)\n"
    )
