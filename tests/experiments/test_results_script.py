"""experiments/results.py: commands in documents, and their tables."""

import runpy
from types import SimpleNamespace

import pytest
from helpers import EXPERIMENTS

from dae.errors import RunError

results = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / "results.py")))

PAGE = """# Page
<!-- results: machine -->
<!-- end -->
<!-- results: python -c 'print(1)' OUTPUT/a -->
old
<!-- end -->
After.
<!-- results: python b NATURAL -->
kept
<!-- end -->
<!-- copy: OUTPUT/a.png -->
![A picture](images/a.png)
"""


def test_commands_of_all_pages_are_found_once(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE + PAGE)
    assert list(results.commands([page, page])) == ["python -c 'print(1)' OUTPUT/a", "python b NATURAL"]
    assert results.PICTURE.findall(PAGE) == [("a.png", "images/a.png")]


def test_new_results_replace_only_the_blocks_of_their_commands():
    command = "python -c 'print(1)' OUTPUT/a"
    text = results.replaced(PAGE, {command: {"stamp": "commit 1", "tables": "| 1 |\n"}}, "2 cores")
    assert text == PAGE.replace("<!-- results: machine -->\n", "<!-- results: machine -->\n2 cores\n").replace(
        "old\n", f"`{command}` (commit 1)\n\n| 1 |\n\n"
    )
    assert results.replaced(text, {}, "2 cores") == text


def test_the_tables_of_a_command_are_kept_or_else_its_last_line(tmp_path):
    assert results.measure("printf 'text\n| 1 |\n| 2 |\n\n| 3 |\nend\n'", tmp_path, None) == "| 1 |\n| 2 |\n\n| 3 |\n"
    assert results.measure("echo 1 && echo OUTPUT/a NATURAL/b", tmp_path, "/n") == f"{tmp_path}/a /n/b"


def test_a_command_that_fails_is_reported_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"^python -c 'exit\(3\)': ended with 3: -$"):
        results.measure("python -c 'exit(3)'", tmp_path, None)
