"""What a user sees on a terminal."""

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, run_subprocess

from dae.reporting import console
from dae.reporting.console import Console

SMALL = ["--train-examples", "3000", "--validation-examples", "64", "--epochs", "2", "--batch-size", "32"]


@contextlib.contextmanager
def open_terminal(columns: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the descriptor of a new terminal, and a list that holds what it has shown when the block has ended."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # raised when the last writer has closed the terminal
            while some := os.read(screen, 65536):
                shown.append(some)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield terminal, shown
    finally:
        os.close(terminal)
        reader.join()
        os.close(screen)


def check_bar(shown: str, columns: int) -> None:
    """Check that a progress bar with a loss was redrawn on one line of a terminal."""
    pieces = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", piece) for piece in re.split(r"[\r\n]+", shown)]
    assert sum("loss 0." in piece for piece in pieces) > 3
    assert max(map(len, pieces)) < columns  # a full line would put the next one below it
    assert len(shown.splitlines()) - shown.count("\r") <= 2, "the bar moves down the screen"


def run_on_terminal(columns: int, *arguments: str, cwd: Path) -> tuple[str, str]:
    """Run run.py, and return its stdout, which is a file, and its stderr, which is a terminal."""
    command = [sys.executable, str(EXPERIMENTS / "run.py"), *SMALL, *arguments]
    with open_terminal(columns) as (terminal, shown), (cwd / "stdout").open("w") as stdout:
        status = subprocess.run(command, cwd=cwd, stdout=stdout, stderr=terminal, timeout=300).returncode
    assert status == 0, b"".join(shown).decode()
    return (cwd / "stdout").read_text(), b"".join(shown).decode()


def use_console(quiet: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Print and show a bar on a console whose stderr is a terminal, and return what the terminal shows."""
    with open_terminal(columns) as (terminal, shown), open(terminal, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown_by = Console(quiet)
        shown_by.print("a line")
        shown_by.start_bar(images=800, done=100)
        for _ in range(7):
            time.sleep(0.11)  # tqdm redraws at most ten times a second
            shown_by.update_bar("epoch 1/2", 100, tf.constant(0.25))
        shown_by.close_bar()
        monkeypatch.undo()
    return b"".join(shown).decode()


def test_progress_bar_stays_on_one_line_of_a_narrow_terminal(monkeypatch, capsys):
    shown = use_console(quiet=False, columns=40, monkeypatch=monkeypatch)
    check_bar(shown, 40)
    assert "epoch 1/2, loss 0.2500" in shown
    assert "100%" in shown
    assert capsys.readouterr().out == "a line\n"


def test_quiet_console_prints_nothing(monkeypatch, capsys):
    assert use_console(quiet=True, columns=80, monkeypatch=monkeypatch) == ""
    assert capsys.readouterr().out == ""


def test_warnings_go_to_stderr(capsys):
    console.warn("beware")
    assert capsys.readouterr() == ("", "warning: beware\n")


def test_epochs_are_formatted_with_and_without_validation():
    line = {"epoch": 1, "train_loss": 0.25, "images_per_second": 1234.0, "seconds": 0.5}
    short = console.format_epoch(line, 3)
    assert short.startswith("epoch 1/3: train loss 0.2500")
    assert "1,234 images/s" in short
    assert "validation" not in short
    full = console.format_epoch(line | {"validation_loss": 0.5, "validation_psnr": 20.0, "validation_ssim": 0.75}, 3)
    for text in ("validation loss 0.5000", "20.00 dB", "0.750"):
        assert text in full


@pytest.mark.slow
def test_run_shows_a_bar_on_stderr_and_a_line_for_each_epoch_on_stdout(tmp_path):
    stdout, shown = run_on_terminal(40, cwd=tmp_path)
    check_bar(shown, 40)
    lines = [line for line in stdout.splitlines() if line.startswith("epoch ")]
    assert [line.partition(": train loss 0")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.slow
def test_quiet_run_prints_nothing_even_on_a_terminal_and_with_a_profile(tmp_path):
    assert run_on_terminal(80, "--quiet", "--profile", "--run-dir", "run", cwd=tmp_path) == ("", "")
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_verbose_shows_what_tensorflow_prints_at_its_start(tmp_path):
    """test_cli.py tests that without --verbose the mistake is the only line."""
    done = run_subprocess("run.py", "--model", "none", "--verbose", cwd=tmp_path)
    assert "oneDNN custom operations are on" in done.stderr
    assert "--model" in done.stderr.splitlines()[-1]
