"""What a user sees on the terminal."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

from conftest import EXPERIMENTS, run_script

SMALL = ["--train-examples", "3000", "--validation-examples", "64", "--epochs", "2", "--batch-size", "32"]


def run_on_a_terminal(columns: int, *arguments: str, cwd) -> tuple[str, str]:
    """What run.py says on stdout, a file, and on stderr, a terminal of so many columns."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, str(EXPERIMENTS / "run.py"), *SMALL, *arguments]
    with (cwd / "stdout").open("w") as stdout:
        process = subprocess.Popen(command, cwd=cwd, stdout=stdout, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while some := os.read(screen, 65536):
            shown += some
    except OSError:  # how a terminal says that nobody is left to write to it
        pass
    os.close(screen)
    assert process.wait() == 0, shown.decode()
    return (cwd / "stdout").read_text(), shown.decode()


def test_the_bar_keeps_to_one_line_of_a_narrow_terminal(tmp_path):
    said, shown = run_on_a_terminal(40, cwd=tmp_path)
    pieces = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", piece) for piece in re.split(r"[\r\n]+", shown)]
    assert sum("loss 0." in piece for piece in pieces) > 3
    assert max(map(len, pieces)) < 40  # a full line would put the next one below it
    assert len(shown.splitlines()) - shown.count("\r") <= 2, "the bar moves down the screen"
    assert [line[:23] for line in said.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2: train loss 0",
        "epoch 2/2: train loss 0",
    ]


def test_quiet_says_nothing_even_on_a_terminal(tmp_path):
    assert run_on_a_terminal(80, "--quiet", "--profile", "--run-dir", "run", cwd=tmp_path) == ("", "")
    assert (tmp_path / "run" / "report.json").exists()


def test_verbose_shows_what_tensorflow_says_while_it_starts(tmp_path):
    mistake = ["--model", "none"]  # found once TensorFlow has started
    assert run_script("run.py", *mistake, cwd=tmp_path).stderr.count("\n") == 1
    done = run_script("run.py", *mistake, "--verbose", cwd=tmp_path)
    assert "oneDNN custom operations are on" in done.stderr
