"""The lock of a run's folder, and what remains of a folder after a mistake."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import rejected

from dae.errors import UsageError
from dae.workdir.workdir import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from dae.workdir.workdir import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_second_process_is_rejected_until_the_first_has_been_killed(tmp_path):
    path = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=r"^--run-dir: another process is using .*/new/run; choose "), locked(path):
            pass
        assert path.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert content(path) == {LOCK}
    with locked(path), pytest.raises(UsageError, match="another process"), locked(path):
        pass
    assert content(path) == set()


def test_a_lock_file_that_its_process_has_just_removed_counts_as_locked(tmp_path, monkeypatch):
    """The file is removed between its opening and its locking."""
    flock = fcntl.flock

    def remove_and_lock(*arguments: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with pytest.raises(UsageError, match="another process"), locked(tmp_path):
        pass


@pytest.mark.parametrize("existing", ["", "mine", "mine/runs", "mine/runs/first"])
def test_only_folders_that_were_made_are_removed_after_a_mistake(existing, tmp_path):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = content(tmp_path)
    path = tmp_path / "mine" / "runs" / "first"
    with pytest.raises(UsageError, match="mistake"), locked(path):  # noqa: PT012
        assert path.is_dir()
        raise UsageError("a mistake")
    assert content(tmp_path) == before
    with locked(path):
        (path / "config.json").touch()
    assert content(path) == {"config.json"}


@pytest.mark.parametrize(
    "name",
    [
        *("", "mine.txt", "mine.txt/run", "lr[1]", "run*", "run?", "back\\slash", "new\nline", "/proc/none/run"),
        *("x" * 300, "new/" + "x" * 300, "new/../" + "x" * 300, "nul\0byte"),
    ],
)
def test_folder_that_cannot_hold_a_run_is_rejected_and_not_touched(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with rejected("--run-dir"), locked(Path(name)):
        pass
    assert content(tmp_path) == {"mine.txt"}
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_system_without_locks_is_rejected_in_one_line(tmp_path, monkeypatch):
    """No such file system is available here, so the system call is replaced by one that fails."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UsageError, match=r"^--run-dir: .* cannot be written or locked \(.*No locks"), locked(tmp_path):
        pass
