"""experiments/photographs.py and the table of docs/photographs.md."""

import runpy
from pathlib import Path

import pytest

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
