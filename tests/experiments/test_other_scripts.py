"""The scripts export.py and photographs.py of experiments/, and the table of docs/photographs.md."""

import re
import runpy
from pathlib import Path

import pytest
from helpers import run_in_process

from dae.inference.export import FORMATS

OUTPUTS = [("savedmodel", "denoise"), ("onnx", "denoise.onnx"), ("litert", "denoise.litert")]


@pytest.mark.parametrize(("format_name", "output"), OUTPUTS)
def test_export_says_what_it_wrote_and_checked_and_nothing_else(format_name, output, tiny_run, tmp_path):
    for module in FORMATS[format_name][1]:
        pytest.importorskip(module, reason="needs the extra `export`")
    done = run_in_process("export.py", tiny_run, "--format", format_name, "--output", output, cwd=tmp_path)
    assert done.stderr == ""
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


ROOT = Path(__file__).parent.parent.parent
SCRIPT = runpy.run_path(str(ROOT / "experiments" / "photographs.py"))


def test_docs_table_of_photographs_equals_the_script():
    rows = [
        f"| `{p.name}` | {p.shows} | {p.package} {SCRIPT['SOURCES'][p.package][0]} | `{p.file}` | {p.author} | "
        f"{p.license} | {p.split} | {p.factor} |"
        for p in SCRIPT["PHOTOGRAPHS"]
    ]
    text = (ROOT / "docs" / "photographs.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
    assert SCRIPT["DIGEST"] in text


def test_every_photograph_is_free_and_in_one_split():
    photographs = SCRIPT["PHOTOGRAPHS"]
    assert {p.license for p in photographs} <= {"public domain", "CC0", "CC-BY-2.0", "CC-BY-4.0"}
    assert len({p.name for p in photographs}) == len({(p.package, p.file) for p in photographs}) == len(photographs)
    assert {p.split for p in photographs} == {"train", "val", "test"}


def test_a_missing_debian_package_is_named_with_the_command_that_downloads_it(tmp_path):
    with pytest.raises(Exception, match=r"run there: apt-get download libjxl-testdata=") as error:
        SCRIPT["folder_of"]("libjxl-testdata", tmp_path, tmp_path)
    assert type(error.value).__name__ == "UsageError"
