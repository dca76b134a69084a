"""A run's folder: what it may be, its lock, and its small files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from helpers import RESOLVED, TINY

from dae import config as config_module
from dae.config import RunConfig
from dae.errors import UsageError
from dae.files import TEMPORARY
from dae.workdir import workdir
from dae.workdir.workdir import Workdir


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
        ({"loss": "bce + 0.1*ssim"}, "mnist-conv-bce+0.1xssim"),
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
    ("names", "expected"),
    [
        ([], False),
        ([f"{TEMPORARY}1.json"], False),
        (["environment.json", f"{TEMPORARY}1.json", "code"], False),
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
def test_folder_of_other_files_is_rejected_and_not_touched(names, resume, tmp_path):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="not a run's"), workdir.opened(tmp_path, TINY, resume):
        pass
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
