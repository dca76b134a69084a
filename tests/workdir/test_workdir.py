"""A run's folder: what it may be, its small files, its lock, and what remains of it after a mistake."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from helpers import RESOLVED, TINY, rejected

from dae import config as config_module
from dae.config import RunConfig
from dae.errors import RunError, UsageError
from dae.files import TEMPORARY
from dae.workdir import workdir
from dae.workdir.workdir import LOCK, Workdir, locked


def start(path: Path, config: RunConfig = TINY) -> None:
    """Start a run in `path` without training."""
    with workdir.opened(path, config, resume=False) as run:
        assert run == Workdir(path, path, config)
        workdir.start(path, config, RESOLVED)


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names below runs/


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "mnist-conv-bce"),
        ({"loss": "bce + 0.10* ssim"}, "mnist-conv-bce+0.1xssim"),
        ({"loss": "bce + 0.1*mine.py:my_loss"}, "mnist-conv-bce+0.1xmy_loss"),
        ({"dataset": "cifar10"}, "cifar10-conv-bce"),
        ({"data": "/images/my faces.npz"}, "myfaces-conv-bce"),
        ({"data": "/images/été/"}, "été-conv-bce"),
    ],
)
def test_default_folder_is_named_after_data_model_and_loss(changes, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    config = RunConfig(**changes)
    assert workdir.new_path(config) == Path("runs", name)
    Path("runs", name).mkdir(parents=True)
    assert workdir.new_path(config) == Path("runs", f"{name}-2")
    Path("runs", f"{name}-2").write_text("a file")
    assert workdir.new_path(config) == Path("runs", f"{name}-3")


# Opening


def test_resume_finds_the_run_if_there_is_one_with_its_record_and_report(tmp_path):
    path = tmp_path / "run"
    with workdir.opened(path, TINY, resume=True) as run:
        assert run == Workdir(path, path, TINY)
    start(path)
    more = replace(TINY, epochs=TINY.epochs + 1)
    for report in (None, {"epochs": TINY.epochs, "epoch": 3.0}):
        with workdir.opened(path, TINY, resume=True) as run:
            assert run == Workdir(path, path, TINY, RESOLVED, report=report)
        with workdir.opened(path, more, resume=True) as run:
            assert run == Workdir(path, path, more, RESOLVED, is_longer=True)
        workdir.write_report(path, {"epochs": TINY.epochs, "epoch": 3.0})


def test_workers_other_than_the_chief_write_to_another_folder_and_lock_none(tmp_path):
    with workdir.opened(tmp_path / "run", TINY, False), workdir.opened(tmp_path / "run", TINY, False, False) as run:
        assert run.path == tmp_path / "run"
        assert run.output.is_dir()
        assert tmp_path / "run" not in (run.output, *run.output.parents)
    assert not run.output.exists()


# What a folder holds


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ([], "empty"),
        ([f"{TEMPORARY}1.json"], "empty"),
        (["environment.json", f"{TEMPORARY}1.json", "code"], "empty"),
        (["environment.json", "code", "config.json", "metrics.jsonl", "mine.txt"], "run"),
        *((names, "other") for names in (["mine.txt"], ["code"], [".git"], ["environment.json", "mine.txt"])),
        (["metrics.jsonl", "environment.json"], "other"),
    ],
)
def test_a_folder_is_a_runs_by_its_config_json_and_one_of_other_files_is_rejected_and_not_touched(
    names, kind, tmp_path
):
    for name in names:
        (tmp_path / name).write_text("mine")
    if kind == "other":
        for resume in (False, True):
            with pytest.raises(UsageError, match="not a run's"), workdir.opened(tmp_path, TINY, resume):
                pass
    else:
        assert workdir.has_run(tmp_path) == (kind == "run")
    assert content(tmp_path) == dict.fromkeys(names, b"mine")


def test_run_killed_before_config_json_was_written_can_be_started_again(tmp_path):
    path = tmp_path / "run"
    start(path)
    (path / "config.json").rename(path / f"{TEMPORARY}1.json")
    start(path, replace(TINY, epochs=9))
    assert set(content(path)) == {"config.json", "resolved.json", "environment.json"}
    assert config_module.read(path / "config.json").epochs == 9


# Its files


def test_start_writes_the_configuration_the_record_the_environment_and_the_code(tmp_path):
    (tmp_path / "my_losses.py").write_text("def my_loss(clean, denoised):\n    return 0\n")
    config, path = replace(TINY, loss=f"bce + {tmp_path}/my_losses.py:my_loss"), tmp_path / "run"
    start(path, config)
    stored = config_module.read(path / "config.json")
    assert f"{path}/code/my_losses.py:my_loss@" in stored.loss
    assert replace(stored, loss=config.loss) == config
    assert (path / "code" / "my_losses.py").read_bytes() == (tmp_path / "my_losses.py").read_bytes()
    assert set(content(path)) == {"config.json", "resolved.json", "environment.json", "code/my_losses.py"}
    environment = workdir.read_environment(path)
    assert environment["versions"]["python"] == sys.version.partition(" ")[0]
    assert {"git_commit", "git_changed_files", "command", "platform", "cpu", "cpu_cores", "gpus"} < set(environment)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(environment["started"]) < timedelta(minutes=1)


def git(*arguments: object, cwd: Path) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", *identity, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def test_the_environment_names_the_commit_of_the_package_if_it_is_part_of_a_checkout(tmp_path, monkeypatch):
    """Not that of the current folder or of the script; a package that is installed in a checkout is not part of it."""
    git("init", cwd=tmp_path)
    git("commit", "--allow-empty", "-m", "empty", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    package = Path(workdir.__file__).parents[1]
    if (package.parent / ".git").exists():
        assert workdir.environment()["git_commit"] == git("rev-parse", "HEAD", cwd=package)
    installed = tmp_path / ".venv" / "dae" / "workdir.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(workdir, "__file__", str(installed))
    for command, expected in ((["status"], (None, None)), (["add", installed.parent], ("HEAD", []))):
        installed.touch()
        git(*command, cwd=tmp_path)
        if expected[0]:
            git("commit", "-m", "dae", cwd=tmp_path)
            expected = (git("rev-parse", "HEAD", cwd=tmp_path), [])
        environment = workdir.environment()
        assert (environment["git_commit"], environment["git_changed_files"]) == expected
    installed.write_text("pass")
    assert workdir.environment()["git_changed_files"] == [" M .venv/dae/workdir.py"]


def test_reopen_records_more_epochs_keeps_the_report_and_removes_remains_of_a_kill(tmp_path, capsys):
    path = tmp_path / "run"
    start(path)
    workdir.write_report(path, {"epoch": TINY.epochs})
    (path / "tensorboard").mkdir()
    for folder in (path, path / "tensorboard"):
        (folder / f"{TEMPORARY}1.json").touch()
    environment = (path / "environment.json").read_bytes()
    workdir.reopen(path, replace(TINY, epochs=9), 0)
    assert config_module.read(path / "config.json") == replace(TINY, epochs=9)
    kept = {"config.json", "resolved.json", "environment.json", "report.json"}
    assert content(path).keys() == {*kept, "metrics.jsonl"}
    assert (path / "environment.json").read_bytes() == environment
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "before"), [("versions", {"tensorflow": "2.20.0"}), ("cpu", "an older processor")])
def test_reopen_warns_of_another_environment(name, before, tmp_path, capsys):
    start(tmp_path / "run")
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: before}))
    workdir.reopen(tmp_path / "run", TINY, 0)
    warning = capsys.readouterr().err
    for part in ("warning", name, str(before)):
        assert part in warning


def test_metrics_are_appended_and_truncated_also_after_a_line_that_a_kill_cut_short(tmp_path):
    assert workdir.read_metrics(tmp_path) == []
    lines = [{"epoch": epoch, "train_loss": 1 / (epoch + 1)} for epoch in (1, 2, 3)]
    for line in lines:
        workdir.append_metrics(tmp_path, line)
    assert workdir.read_metrics(tmp_path) == lines
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 4)
    for epochs in (2, 2, 1, 0):
        workdir.truncate_metrics(tmp_path, epochs)
        assert workdir.read_metrics(tmp_path) == lines[:epochs]
    workdir.append_metrics(tmp_path, lines[0])
    assert workdir.read_metrics(tmp_path) == lines[:1]


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1}\n', '{"epoch": 2}\n' * 2, "\0\n\n", "3\n4\n", b"\xff"])
def test_metrics_without_the_lines_of_a_checkpoint_are_rejected_and_not_touched(content, tmp_path):
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(UsageError, match=r"metrics\.jsonl: missing or damaged, without the lines of all 2 epochs"):
        workdir.truncate_metrics(tmp_path, 2)
    assert (file.read_bytes() if file.exists() else None) == before


def test_report_is_read_back_and_a_damaged_one_rejected(tmp_path):
    workdir.write_report(tmp_path, {"epoch": 3, "test_loss": 0.1})
    assert workdir.read_report(tmp_path) == {"epoch": 3, "test_loss": 0.1}
    os.truncate(tmp_path / "report.json", 10)
    with pytest.raises(UsageError, match="damaged"):
        workdir.read_report(tmp_path)


HOLD = """
import sys
from pathlib import Path
from dae.workdir.workdir import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def names_in(folder: Path) -> set[str]:
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
    assert names_in(path) == {LOCK}
    with locked(path), pytest.raises(UsageError, match="another process"), locked(path):
        pass
    assert names_in(path) == set()


def test_a_lock_file_that_its_process_has_just_removed_counts_as_locked(tmp_path, monkeypatch):
    """The file is removed between its opening and its locking."""
    flock = fcntl.flock

    def remove_and_lock(*arguments: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with pytest.raises(UsageError, match="another process"), locked(tmp_path):
        pass


@pytest.mark.parametrize("happens", ["renamed", "deleted", "replaced", "nothing"])
def test_a_folder_that_is_no_longer_the_one_that_was_locked_is_found_and_left_alone(happens, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    with locked(run) as check:
        check()
        if happens != "nothing":
            run.rename(moved)
        if happens == "deleted":
            shutil.rmtree(moved)
        if happens == "replaced":
            run.mkdir()
            (run / LOCK).touch()
        message = f"^--run-dir: {run} was renamed, deleted or replaced during the run"
        with contextlib.nullcontext() if happens == "nothing" else pytest.raises(RunError, match=message):
            check()
    assert run.exists() == (happens == "replaced")


@pytest.mark.parametrize("existing", ["", "mine", "mine/runs", "mine/runs/first"])
def test_only_folders_that_were_made_are_removed_after_a_mistake(existing, tmp_path):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = names_in(tmp_path)
    path = tmp_path / "mine" / "runs" / "first"
    with pytest.raises(UsageError, match="mistake"), locked(path):  # noqa: PT012
        assert path.is_dir()
        raise UsageError("a mistake")
    assert names_in(tmp_path) == before
    with locked(path):
        (path / "config.json").touch()
    assert names_in(path) == {"config.json"}


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
    assert names_in(tmp_path) == {"mine.txt"}
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_system_without_locks_is_rejected_in_one_line(tmp_path, monkeypatch):
    """No such file system is available here, so the system call is replaced by one that fails."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UsageError, match=r"^--run-dir: .* cannot be written or locked \(.*No locks"), locked(tmp_path):
        pass
