"""A run's folder: what it may be, its lock, and its small files."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import TINY

from dae import config as config_module
from dae.config import RunConfig, canonicalize
from dae.errors import UsageError
from dae.workdir import workdir
from dae.workdir.files import TEMPORARY

CONFIG = canonicalize(TINY)


def start(path: Path) -> RunConfig:
    """Start a run in `path` without training."""
    with workdir.opened(path, CONFIG, resume=False):
        return workdir.start(path, CONFIG, {})


def finish(path: Path) -> None:
    """Mark the run in `path` as finished."""
    workdir.write_report(path, {"epoch": TINY.epochs})


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names below runs/


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "mnist-conv-bce"),
        ({"loss": "bce + 0.1*ssim"}, "mnist-conv-bce+0.1xssim"),
        ({"loss": "/my dir/my_losses.py:my_loss"}, "mnist-conv-my_loss"),
        ({"dataset": "cifar10"}, "cifar10-conv-bce"),
        ({"data": "/images/my faces.npz"}, "myfaces-conv-bce"),
        ({"data": "/images/faces/"}, "faces-conv-bce"),
    ],
)
def test_default_folder_is_named_after_data_model_and_loss(changes, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(**changes)
    assert workdir.new_path(config) == Path("runs", name)
    Path("runs", name).mkdir(parents=True)
    assert workdir.new_path(config) == Path("runs", f"{name}-2")
    Path("runs", f"{name}-2").write_text("a file")
    assert workdir.new_path(config) == Path("runs", f"{name}-3")


@pytest.mark.parametrize(
    ("setting", "name"), [("bce", "bce"), ("2.0*mse+ bce", "2.0xmse+bce"), ("a/b c", "a-bc"), ("été", "été")]
)
def test_slug_is_a_readable_folder_name(setting, name):
    assert workdir.slug(setting) == name


# Opening


def test_new_folder_is_kept_once_a_run_has_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with workdir.opened(None, CONFIG, resume=False) as run:
        assert (run.path, run.config) == (Path("runs/mnist-conv-bce"), CONFIG)
        assert not run.has_run
        assert not run.is_finished
        assert run.path.is_dir()
        workdir.start(run.path, run.config, {})
    assert workdir.has_run(run.path)


@pytest.mark.parametrize("existing", ["", "mine", "mine/runs"])
def test_only_folders_that_were_made_are_removed_after_a_mistake(existing, tmp_path):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    path = tmp_path / "mine" / "runs" / "first"
    with pytest.raises(UsageError, match="mistake"), workdir.opened(path, CONFIG, resume=False):  # noqa: PT012
        assert path.is_dir()
        raise UsageError("a mistake")
    assert (tmp_path / existing).is_dir()
    folders = {str(folder.relative_to(tmp_path)) for folder in tmp_path.rglob("*")}
    assert folders == {"": set(), "mine": {"mine"}, "mine/runs": {"mine", "mine/runs"}}[existing]


def test_existing_empty_folder_is_kept_after_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="mistake"), workdir.opened(tmp_path, CONFIG, resume=False):
        raise UsageError("a mistake")
    assert tmp_path.is_dir()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("", "mine.txt", "mine.txt/run", "lr[1]", "run*", "run?", "back\\slash", "new\nline", "/proc/none/run"),
        *("x" * 300, "new/" + "x" * 300, "new/../" + "x" * 300, "nul\0byte"),
    ],
)
def test_folder_that_cannot_hold_a_run_is_refused_and_not_touched(name, resume, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="--run-dir"), workdir.opened(tmp_path / name, CONFIG, resume):
        pass
    assert content(tmp_path) == {"mine.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_current_folder_is_refused(resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", "."):
        with pytest.raises(UsageError, match="--run-dir"), workdir.opened(name, CONFIG, resume):
            pass
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_a_folder():
    with pytest.raises(UsageError, match=r"--resume.*--run-dir"), workdir.opened(None, CONFIG, resume=True):
        pass


def test_resume_starts_a_run_if_there_is_none(tmp_path):
    with workdir.opened(tmp_path / "run", CONFIG, resume=True) as run:
        assert not run.has_run


def test_second_start_of_a_run_is_refused_and_changes_nothing(tmp_path):
    start(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(UsageError, match="--resume"), workdir.opened(tmp_path / "run", CONFIG, resume=False):
        pass
    assert content(tmp_path) == before


def test_resume_finds_the_run_and_its_configuration(tmp_path):
    recorded = replace(CONFIG, shards=3, intra_op_threads=1)
    path = tmp_path / "run"
    with workdir.opened(path, recorded, resume=False):
        workdir.start(path, recorded, {})
    for is_finished in (False, True):
        with workdir.opened(path, CONFIG, resume=True) as run:
            assert run == workdir.Workdir(path, recorded, has_run=True, is_longer=False, is_finished=is_finished)
        finish(path)
    more = replace(CONFIG, epochs=TINY.epochs + 1)
    with workdir.opened(path, more, resume=True) as run:
        assert run == workdir.Workdir(
            path, replace(recorded, epochs=TINY.epochs + 1), has_run=True, is_longer=True, is_finished=False
        )


def test_resume_with_another_configuration_is_refused(tmp_path):
    start(tmp_path / "run")
    other = replace(CONFIG, batch_size=32, seed=1)
    with (
        pytest.raises(UsageError, match=r"--batch-size was 64, now 32; --seed was 0, now 1"),
        workdir.opened(tmp_path / "run", other, resume=True),
    ):
        pass


# The lock

HOLD_LOCK = """
import sys
from dae.config import RunConfig
from dae.workdir import workdir
with workdir.opened(sys.argv[1], RunConfig(), resume=True):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process, which has opened the folder `run`."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_second_process_is_refused_until_the_first_has_ended(other_process, tmp_path):
    for resume in (False, True):
        with (
            pytest.raises(UsageError, match="another process is using"),
            workdir.opened(tmp_path / "run", CONFIG, resume),
        ):
            pass
    assert (tmp_path / "run").is_dir()
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with workdir.opened(tmp_path / "run", CONFIG, resume=True) as run:
        workdir.start(run.path, run.config, {})
    assert workdir.has_run(tmp_path / "run")


HOLD_FILE = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked", flush=True)
    sys.stdin.read()
"""


def fails(number: int) -> Callable[..., None]:
    """Return a system call that fails with this error."""

    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def no_flock(request, monkeypatch) -> None:
    """No file system without `flock` is available here, so the system call is replaced by one that fails."""
    monkeypatch.setattr(fcntl, "flock", fails(request.param))


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_locked_where_folders_cannot_be(resume, no_flock, tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD_FILE, str(tmp_path / "run" / workdir.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(UsageError, match="another process is using"),
            workdir.opened(tmp_path / "run", CONFIG, resume),
        ):
            pass
        process.kill()
    with workdir.opened(tmp_path / "run", CONFIG, resume) as run:
        workdir.start(run.path, run.config, {})
    with workdir.opened(tmp_path / "run", CONFIG, resume=True) as run:
        assert run.has_run


def test_a_locked_file_is_removed_with_the_folders_after_a_mistake(no_flock, tmp_path):
    for path in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(UsageError, match="mistake"), workdir.opened(path, CONFIG, resume=False):
            raise UsageError("a mistake")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_any_locks_is_refused_in_one_line(no_flock, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", fails(errno.ENOLCK))
    path = tmp_path / "new" / "run"
    with pytest.raises(UsageError) as caught, workdir.opened(path, CONFIG, resume=False):
        pass
    expected = f"--run-dir: {path} cannot be locked (No locks available); choose a folder on a file system with locks"
    assert str(caught.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_lock_is_released_after_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="mistake"), workdir.opened(tmp_path, CONFIG, resume=False):
        raise UsageError("a mistake")
    with (
        workdir.opened(tmp_path, CONFIG, resume=False),
        pytest.raises(UsageError, match="another process"),
        workdir.opened(tmp_path, CONFIG, resume=False),
    ):
        pass


# What a folder holds


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], False),
        ([f"{TEMPORARY}1.json"], False),
        (["environment.json"], False),
        (["environment.json", f"{TEMPORARY}1.json", "code"], False),
        (["config.json"], True),
        (["environment.json", "code", "config.json", "metrics.jsonl", "mine.txt"], True),
    ],
)
def test_has_run_is_decided_by_config_json(names, expected, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert workdir.has_run(tmp_path) == expected


@pytest.mark.parametrize(
    "names", [["mine.txt"], ["code"], [".git"], ["environment.json", "mine.txt"], ["metrics.jsonl", "environment.json"]]
)
@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_other_files_is_refused_and_not_touched(names, resume, tmp_path):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="not a run's"), workdir.opened(tmp_path, CONFIG, resume):
        pass
    assert content(tmp_path) == dict.fromkeys(names, b"mine")


@pytest.mark.parametrize("resume", [False, True])
def test_run_killed_before_config_json_was_written_can_be_started_again(resume, tmp_path):
    path = tmp_path / "run"
    with workdir.opened(path, CONFIG, resume=False):
        workdir.start(path, CONFIG, {"my_loss.py": "old"})
    (path / "config.json").rename(path / f"{TEMPORARY}1.json")
    with workdir.opened(path, CONFIG, resume) as run:
        assert not run.has_run
        workdir.start(path, CONFIG, {"my_loss.py": "new"})
    assert set(content(path)) == {"config.json", "environment.json", "code/my_loss.py"}
    assert (path / "code" / "my_loss.py").read_text() == "new"


# Its files


def test_start_writes_the_configuration_the_environment_and_the_code(tmp_path):
    (tmp_path / "my_losses.py").write_text("def my_loss(clean, denoised):\n    return 0\n")
    config = canonicalize(replace(TINY, loss=f"bce + {tmp_path}/my_losses.py:my_loss"))
    path = tmp_path / "run"
    with workdir.opened(path, config, resume=False):
        stored = workdir.start(path, config, {"more.py": "# more\n"})
    assert stored == config_module.read(path / "config.json")
    assert f"{path}/code/my_losses.py:my_loss@" in stored.loss
    assert replace(stored, loss=config.loss) == config
    assert (path / "code" / "my_losses.py").read_bytes() == (tmp_path / "my_losses.py").read_bytes()
    assert (path / "code" / "more.py").read_text() == "# more\n"
    assert set(content(path)) == {"config.json", "environment.json", "code/my_losses.py", "code/more.py"}
    environment = workdir.read_environment(path)
    assert environment["versions"]["python"] == sys.version.partition(" ")[0]
    assert {"git_commit", "git_changed_files", "command", "platform", "cpu", "cpu_cores", "gpus"} < set(environment)


def test_start_in_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "environment.json").mkdir()
    with pytest.raises(UsageError, match=r"--run-dir.*cannot be written"):
        workdir.start(tmp_path, CONFIG, {})


def test_reopen_records_more_epochs_and_removes_the_report_and_remains_of_a_kill(tmp_path, capsys):
    path = tmp_path / "run"
    start(path)
    finish(path)
    (path / "tensorboard").mkdir()
    for folder in (path, path / "tensorboard"):
        (folder / f"{TEMPORARY}1.json").touch()
    environment = (path / "environment.json").read_bytes()
    more = workdir.reopen(path, replace(CONFIG, epochs=9))
    assert more == config_module.read(path / "config.json") == replace(CONFIG, epochs=9)
    assert content(path).keys() == {"config.json", "environment.json"}
    assert (path / "environment.json").read_bytes() == environment
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "before"), [("versions", {"tensorflow": "2.20.0"}), ("cpu", "an older processor")])
def test_reopen_warns_of_another_environment(name, before, tmp_path, capsys):
    start(tmp_path / "run")
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: before}))
    workdir.reopen(tmp_path / "run", CONFIG)
    warning = capsys.readouterr().err
    for part in ("warning", name, str(before)):
        assert part in warning


def test_metrics_are_appended_and_truncated(tmp_path):
    lines = [{"epoch": epoch, "train_loss": 1 / (epoch + 1)} for epoch in (1, 2, 3)]
    for line in lines:
        workdir.append_metrics(tmp_path, line)
    assert workdir.read_metrics(tmp_path) == lines
    for epochs in (3, 2, 2, 1, 0):
        workdir.truncate_metrics(tmp_path, epochs)
        assert workdir.read_metrics(tmp_path) == lines[:epochs]
    workdir.append_metrics(tmp_path, lines[0])
    assert workdir.read_metrics(tmp_path) == lines[:1]


def test_truncate_metrics_drops_a_line_that_a_kill_cut_short(tmp_path):
    for epoch in (1, 2, 3):
        workdir.append_metrics(tmp_path, {"epoch": epoch})
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 4)
    workdir.truncate_metrics(tmp_path, 2)
    workdir.append_metrics(tmp_path, {"epoch": 3})
    assert [line["epoch"] for line in workdir.read_metrics(tmp_path)] == [1, 2, 3]


def test_truncate_metrics_makes_an_empty_file_if_there_is_none(tmp_path):
    workdir.truncate_metrics(tmp_path, 0)
    assert workdir.read_metrics(tmp_path) == []


def test_report_is_read_back_and_a_missing_or_damaged_one_refused(tmp_path):
    with pytest.raises(UsageError, match="not a finished run"):
        workdir.read_report(tmp_path)
    workdir.write_report(tmp_path, {"epoch": 3, "test_loss": 0.1})
    assert workdir.read_report(tmp_path) == {"epoch": 3, "test_loss": 0.1}
    os.truncate(tmp_path / "report.json", 10)
    with pytest.raises(UsageError, match="damaged"):
        workdir.read_report(tmp_path)
