import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, run_in_process
from hypothesis import given
from hypothesis import strategies as st

from dae import cli, plugins
from dae import config as config_module
from dae.config import RunConfig
from dae.errors import UsageError
from dae.plugins import label, load, references, unique_names
from dae.training import trainer
from dae.workdir import workdir

LOSSES = """
import tensorflow as tf

def fourth_power(clean, denoised):
    return tf.reduce_mean((clean - denoised) ** 4, axis=[1, 2, 3])
"""
NOISE = """
def darker(clean, level, seed):
    return clean * (1 - level)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a file of losses and one of noise."""
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(LOSSES)
    Path("my_noise.py").write_text(NOISE)
    return tmp_path


NAMES = st.lists(st.sampled_from(["a", "b", "a-2", "a-3"]))


@given(NAMES)
def test_unique_names_are_unique_and_change_only_repeated_names(names):
    made = unique_names(names)
    assert len(set(made)) == len(names)
    assert all(one.startswith(name) for one, name in zip(made, names, strict=True))
    if len(set(names)) == len(names):
        assert made == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bce", []),
        ("my_losses.py:f", [("my_losses.py", "f")]),
        ("bce + 0.1*a/my.py:f+ 2 * ../b.py:g", [("a/my.py", "f"), ("../b.py", "g")]),
        ("/my files/a+b/c.py:f + /d*e.py:g", [("/my files/a+b/c.py", "f"), ("/d*e.py", "g")]),
        ("my losses.py:f", [("my losses.py", "f")]),
        ("a.py", []),
        ("a.py:", []),
        ("a.py:f g", []),
    ],
)
def test_references_are_found_also_within_a_sum(text, expected):
    assert [(one.path, one.function) for one in references(text)] == expected
    assert plugins.substitute(text, lambda one: one) == text


def test_a_file_runs_once_for_each_content(folder):
    source = "with open('log', 'a') as log:\n    log.write('run ')\ndef f(): return {}\n"
    Path("counting.py").write_text(source.format(1))
    table: dict[str, Any] = {}
    assert load(table, "counting.py:f", "--loss") is load(table, "counting.py:f", "--loss")
    assert load(table, "counting.py:f", "--loss")() == 1
    assert Path("log").read_text() == "run "
    assert not Path("__pycache__").exists()
    Path("counting.py").write_text(source.format(2))
    assert load(table, "counting.py:f", "--loss")() == 2
    assert Path("log").read_text() == "run run "


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "none.py:f", ["none.py", "no such file"]),
        ("def f(: ...", "mine.py:f", ["mine.py", "line 1 ", "SyntaxError: "]),
        ("\n\nimport nonesuch", "mine.py:f", ["mine.py", "line 3 ", "ModuleNotFoundError: ", "nonesuch"]),
        ("import sys\nsys.exit(3)", "mine.py:f", ["mine.py", "line 2 ", "SystemExit: 3"]),
        ("raise ValueError()", "mine.py:f", ["mine.py", "line 1 ", "(ValueError)"]),
        ("\0", "mine.py:f", ["mine.py", "fails ("]),
        ("def my_loss(): ...", "mine.py:my_los", ["mine.py", "'my_los'", "did you mean 'my_loss'?"]),
        ("x = 3", "mine.py:x", ["mine.py", "'x'", "none"]),
        ("", "mine.py", ["'mine.py'", "bce", "FILE.py:FUNCTION"]),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_in_one_line(content, name, words, folder):
    Path("mine.py").write_text(content)
    with pytest.raises(UsageError) as caught:
        load({"bce": len}, name, "--loss")
    assert str(caught.value).startswith("--loss: ")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_keeps_its_files_and_can_be_moved_verified_and_evaluated(folder):
    config = replace(TINY, epochs=1, loss="my_losses.py:fourth_power", noise="my_noise.py:darker")
    trainer.train(config, "run")
    assert Path("run/code/my_losses.py").read_text() == LOSSES
    assert Path("run/code/my_noise.py").read_text() == NOISE
    saved = json.loads(Path("run/config.json").read_text())
    digest = hashlib.sha256(LOSSES.encode()).hexdigest()
    assert saved["loss"] == f"code/my_losses.py:fourth_power@{digest}"

    # The run needs nothing but its folder, wherever that is.
    for file in ("my_losses.py", "my_noise.py"):
        os.remove(file)
    shutil.move("run", "moved + renamed")
    done = run_in_process("verify.py", "moved + renamed", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_in_process("evaluate.py", "moved + renamed", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")

    # A changed file is refused before it is run.
    kept = Path("moved + renamed/code/my_losses.py")
    kept.write_text(LOSSES + "\nopen('was run', 'w')\n")
    done = run_in_process("verify.py", "moved + renamed", cwd=folder)
    assert done.returncode == 2
    assert f"--loss: {kept.absolute()}: " in done.stderr
    assert f"SHA-256 {digest}" in done.stderr
    assert not Path("was run").exists()


@pytest.mark.slow
def test_the_command_of_a_run_resumes_it_with_the_copy_in_the_run(folder):
    def parse(line: str) -> RunConfig:
        return config_module.canonicalize(cli.parse_run([*line.split(), "--run-dir", "run", "--resume"]).config)

    command = "--train-examples 64 --validation-examples 64 --epochs 1 --loss my_losses.py:fourth_power"
    trainer.train(parse(command), "run", resume=True)
    with workdir.opened("run", parse(command), resume=True) as run:
        assert run.is_finished
        assert references(run.config.loss)[0].path == str(folder / "run" / "code" / "my_losses.py")

    Path("my_losses.py").write_text(LOSSES + "# another content\n")
    with pytest.raises(UsageError, match=r"--loss was '.*', now '.*my_losses.py:fourth_power@"):
        trainer.train(parse("--loss my_losses.py:fourth_power"), "run", resume=True)
    with pytest.raises(UsageError, match=r"--loss was '.*', now 'bce'"):
        trainer.train(parse("--loss bce"), "run", resume=True)
    os.remove("my_losses.py")
    trainer.train(parse("--epochs 2"), "run", resume=True)
    assert [line["epoch"] for line in workdir.read_metrics(Path("run"))] == [1, 2]
    assert Path("run/code/my_losses.py").read_text() == LOSSES


def test_two_files_of_the_same_name_are_both_kept(folder):
    Path("other").mkdir()
    Path("other/my_noise.py").write_text(LOSSES)
    config = replace(TINY, loss="other/my_noise.py:fourth_power", noise="my_noise.py:darker")
    with workdir.opened("run", config_module.canonicalize(config), resume=False) as run:
        config = workdir.start(run.path, run.config, {})
    assert config_module.read(Path("run/config.json")) == config
    for text, content in ((config.noise, NOISE), (config.loss, LOSSES)):
        (reference,) = references(text)
        assert Path(reference.path).parent == folder / "run" / "code"
        assert Path(reference.path).read_text() == content
        assert load({}, text, "--loss").__name__ == reference.function


def test_a_run_is_named_after_the_function(folder):
    config = config_module.canonicalize(replace(TINY, loss="bce + 0.1*my_losses.py:fourth_power"))
    assert workdir.new_path(config) == Path("runs/mnist-conv-bce+0.1xfourth_power")


def test_label_shows_only_the_function():
    assert label("bce + 0.1*/a/my_losses.py:fourth_power@" + "0" * 64) == "bce + 0.1*fourth_power"


@pytest.mark.parametrize("wrong", ["my_losses.py:fourth", "none.py:f", "my_noise.py:darker"])
def test_a_mistake_is_found_before_anything_is_written(wrong, folder):
    with pytest.raises(UsageError, match="--loss"):
        trainer.train(replace(TINY, loss=wrong), "run")
    assert not Path("run").exists()


def test_parsing_a_reference_does_not_import_tensorflow(folder):
    code = "import sys; from dae import cli; print(cli.parse_run(sys.argv[1:]).config.loss); "
    code += "sys.exit('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--loss", "my_losses.py:fourth_power"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "my_losses.py:fourth_power\n")
