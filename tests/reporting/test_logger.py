"""The output of a run on a terminal."""

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
from collections.abc import Callable, Iterator

import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, RESOLVED, TINY, small_network

from dae.data import pipeline
from dae.reporting import logger
from dae.reporting.logger import Console, Logger
from dae.workdir.workdir import Workdir


@contextlib.contextmanager
def open_terminal(columns: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the descriptor of a new terminal, and a list that holds what it has shown when the block has ended."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # raised when the last writer has closed the terminal
            while content := os.read(screen, 65536):
                shown.append(content)

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


@pytest.fixture
def make_logger(mnist, tmp_path) -> Callable[[bool], Logger]:
    """A function that returns the logger of a run of TINY within its third epoch, quiet or not."""
    samples = pipeline.sample_batch(mnist.validation[-8:], TINY, "validation")
    arguments = Workdir(tmp_path, tmp_path, TINY), TINY, RESOLVED, small_network((28, 28, 1)), samples
    return lambda quiet: Logger(*arguments, Console(quiet), step=25, images_per_epoch=600)


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bar_stays_on_one_line_of_a_narrow_terminal_and_a_quiet_run_prints_nothing(
    quiet, make_logger, monkeypatch, capsys
):
    with open_terminal(40) as (terminal, pieces), open(terminal, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with make_logger(quiet) as writer:
            writer.print("a line")
            for _ in range(5):
                time.sleep(0.11)  # tqdm redraws at most ten times a second
                writer.progress(3, 60, tf.constant(0.25))
        monkeypatch.undo()
    shown = b"".join(pieces).decode()
    if quiet:
        assert (shown, capsys.readouterr().out) == ("", "")
    else:
        check_bar(shown, 40)
        assert "epoch 3/3, loss 0.2500" in shown
        assert " 84%" in shown  # 5 steps of 64 images and 5 of 60 after two epochs of three
        assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize(("quiet", "seconds", "lines"), [(False, 30, 0), (False, 0, 5), (True, 0, 0)])
def test_a_log_file_gets_a_line_when_none_was_written_for_some_time(
    quiet, seconds, lines, make_logger, monkeypatch, capsys
):
    monkeypatch.setattr(logger, "SECONDS_BETWEEN_LINES", seconds)
    with make_logger(quiet) as writer:
        for _ in range(5):
            writer.progress(3, 60, tf.constant(0.25))
    shown = capsys.readouterr()
    assert (len(shown.out.splitlines()), shown.err) == (lines, "")
    assert not lines or shown.out.startswith("epoch 3/3: 87.8% of the run, loss 0.2500\n")


def test_epochs_are_formatted_with_and_without_validation():
    line = {"epoch": 1, "train_loss": 0.25, "images_per_second": 1234.0, "seconds": 0.5}
    short = logger.format_epoch(line, 3)
    assert short.startswith("epoch 1/3: train loss 0.2500")
    assert "1,234 images/s" in short
    assert "validation" not in short
    full = logger.format_epoch(line | {"validation_loss": 0.5, "validation_psnr": 20.0, "validation_ssim": 0.75}, 3)
    for text in ("validation loss 0.5000", "20.00 dB", "0.750"):
        assert text in full


@pytest.mark.slow
def test_run_shows_a_bar_on_stderr_and_a_line_for_each_epoch_on_stdout_and_has_a_readable_new_name(tmp_path):
    (tmp_path / "runs" / "mnist-conv-bce").mkdir(parents=True)
    flags = ["--train-examples", "3000", "--validation-examples", "64", "--epochs", "2", "--batch-size", "32"]
    command = [sys.executable, str(EXPERIMENTS / "run.py"), *flags]
    with open_terminal(40) as (terminal, pieces), (tmp_path / "stdout").open("w") as file:
        status = subprocess.run(command, cwd=tmp_path, stdout=file, stderr=terminal, timeout=300).returncode
    stdout, shown = (tmp_path / "stdout").read_text(), b"".join(pieces).decode()
    assert status == 0, shown
    check_bar(shown, 40)
    lines = [line for line in stdout.splitlines() if line.startswith("epoch ")]
    assert [line.partition(": train loss 0")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert "encoder (MaxPooling2D)" in stdout
    assert (tmp_path / "runs" / "mnist-conv-bce-2" / "report.json").exists()
