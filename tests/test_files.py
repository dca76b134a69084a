import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from dae.errors import UsageError
from dae.files import TEMPORARY, atomic_path, atomic_write, check_output, files_in


def test_files_are_found_through_links_but_not_in_loops_hidden_or_excluded_folders(tmp_path):
    for name in ("in/b.png", "in/a/c.png", "in/.hidden/d.png", "in/.e.png", "in/out/f.png", "elsewhere/g.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (("linked", "../elsewhere"), ("a/loop", ".."), ("self", "."), ("nowhere.png", "none")):
        (tmp_path / "in" / link).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    found = [str(path.relative_to(tmp_path / "in")) for path in files_in(tmp_path / "in", tmp_path / "in" / "out")]
    assert found == ["a/c.png", "b.png", "linked/g.png", "nowhere.png"]


@pytest.mark.parametrize("content", ["text: é\n", b"\x00\xff"])
def test_atomic_write_writes_text_and_bytes(content, tmp_path):
    (tmp_path / "file.json").write_text("before")
    atomic_write(tmp_path / "file.json", content)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "file.json").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_atomic_path_has_the_suffix_and_becomes_the_file_at_the_end(tmp_path):
    with atomic_path(tmp_path / "model.keras") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".keras")
        assert temporary.name.startswith(TEMPORARY)
        temporary.write_text("new")
        assert not (tmp_path / "model.keras").exists()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.keras", "new")]


def test_atomic_path_can_become_a_folder_in_place_of_an_empty_one(tmp_path):
    (tmp_path / "model").mkdir()
    with atomic_path(tmp_path / "model") as temporary:
        (temporary / "variables").mkdir(parents=True)
        (temporary / "variables" / "index").write_text("new")
        assert not any((tmp_path / "model").iterdir())
    assert (tmp_path / "model" / "variables" / "index").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_that_failed_or_whose_path_is_taken_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("before")
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "taken") as temporary:
        temporary.mkdir()
    with pytest.raises(RuntimeError, match="failed"), atomic_path(tmp_path / "new") as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "file.txt").write_text("half")
        raise RuntimeError("failed")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file.txt"]
    assert (tmp_path / "taken" / "file.txt").read_text() == "before"


@pytest.mark.parametrize("written", [True, False])
def test_failed_write_keeps_the_file_and_leaves_no_other(written, tmp_path):
    (tmp_path / "file.txt").write_text("before")
    with pytest.raises(RuntimeError, match="failed"), atomic_path(tmp_path / "file.txt") as temporary:  # noqa: PT012
        if written:
            temporary.write_text("half")
        raise RuntimeError("failed")
    assert (tmp_path / "file.txt").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from dae.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_while_writing_keeps_the_file(tmp_path):
    (tmp_path / "file.txt").write_text("before")
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path / "file.txt"], check=False)
    assert killed.returncode < 0
    assert (tmp_path / "file.txt").read_text() == "before"
    (left,) = (path for path in tmp_path.iterdir() if path.name != "file.txt")
    assert left.name.startswith(TEMPORARY)


OUTPUTS = {"old.png": True, "new.csv": True, "plot.jpg": False, "plot": False, "folder.png": False}
OUTPUTS |= {"none/plot.png": False, "old.png/plot.png": False}
FOLDERS = {"empty": True, "new": True, "full": False, "full/file.txt": False, "none/new": False}


@pytest.mark.parametrize(("name", "is_allowed"), [*OUTPUTS.items(), *FOLDERS.items()])
def test_an_output_that_could_not_be_written_is_rejected_and_none_is_touched(name, is_allowed, tmp_path):
    for folder in ("folder.png", "empty", "full"):
        (tmp_path / folder).mkdir()
    for file in ("old.png", "full/file.txt"):
        (tmp_path / file).write_text("before")
    before = sorted(tmp_path.rglob("*"))
    with nullcontext() if is_allowed else pytest.raises(UsageError, match=r"^--output: "):
        check_output(tmp_path / name, (".png", ".csv") if name in OUTPUTS else (), "--output")
    assert sorted(tmp_path.rglob("*")) == before
