import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, run_in_process
from hypothesis import given
from hypothesis import strategies as st

from dae import cli, plugins
from dae import config as config_module
from dae.analysis import reproducibility
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


# Reads the array when the file is run.
SCALED = """
from pathlib import Path

import numpy as np
import tensorflow as tf

FILES = ["scale.npy"]
SCALE = np.load(Path(__file__).parent / FILES[0])

def scaled(clean, denoised):
    return tf.reduce_mean(SCALE * (clean - denoised) ** 2, axis=[1, 2, 3])
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
    assert done.returncode == 0, done.stderr
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


def save_scaled(folder: Path, factor: float, source: str = SCALED) -> str:
    """Write a loss with an array beside it, and return the loss's name."""
    folder.mkdir(exist_ok=True)
    (folder / "scaled.py").write_text(source)
    np.save(folder / "scale.npy", np.full((28, 28, 1), factor, np.float32))
    return f"{folder}/scaled.py:scaled"


def started(loss: str, noise: str = "gaussian") -> RunConfig:
    """Return the configuration of a run in the folder `run` once it is written."""
    config = config_module.canonicalize(replace(TINY, loss=loss, noise=noise))
    with workdir.opened("run", config, resume=False) as run:
        return workdir.start(run.path, run.config, {})


def test_files_that_a_loss_reads_are_kept_with_it(folder):
    config = started(f"bce + 0.5*{save_scaled(folder / 'mine', 3)}")
    assert sorted(path.name for path in Path("run/code").rglob("*")) == ["scale.npy", "scaled", "scaled.py"]
    for name in ("scaled.py", "scale.npy"):
        assert Path("run/code/scaled", name).read_bytes() == Path("mine", name).read_bytes()
    assert json.loads(Path("run/config.json").read_text())["loss"].startswith("bce + 0.5*code/scaled/scaled.py:scaled@")
    shutil.rmtree("mine")
    (reference,) = references(config.loss)
    load({}, str(reference), "--loss")
    images = np.ones((2, 28, 28, 1), np.float32)
    assert load({}, str(reference), "--loss")(images, 0 * images).numpy().tolist() == [3, 3]


@pytest.mark.parametrize("name", ["scaled.py", "scale.npy"])
def test_an_edit_of_any_kept_file_is_refused_before_it_is_run(name, folder):
    config = started(save_scaled(folder, 3))
    kept = Path("run/code/scaled", name)
    kept.write_bytes(kept.read_bytes() + (b"\nopen('was run', 'w')\n" if name == "scaled.py" else b"0"))
    with pytest.raises(UsageError, match=r"^--loss: .*/run/code/scaled/scaled\.py: differs from the files .*SHA-256"):
        load({}, config.loss, "--loss")
    assert not Path("was run").exists()


def test_a_resume_with_an_edited_array_is_refused(folder):
    loss = save_scaled(folder / "mine", 3)
    started(loss)
    for factor in (3, 4):
        save_scaled(folder / "mine", factor)
        requested = config_module.canonicalize(replace(TINY, loss=loss))
        if factor == 3:
            with workdir.opened("run", requested, resume=True) as run:
                assert references(run.config.loss)[0].path == str(folder / "run/code/scaled/scaled.py")
        else:
            with pytest.raises(UsageError, match=r"--loss was '.*', now '"), workdir.opened("run", requested, True):
                pass


def test_the_digest_covers_which_file_has_which_content(folder):
    files = {"a": b"1", "b": b"23"}
    digests = set()
    for contents in (files, {"a": b"12", "b": b"3"}, {"a": b"23", "b": b"1"}, {"a": b"1"}):
        Path("mine.py").write_text(f"FILES = {sorted(files)}\ndef f(): ...\n")
        for name in files:
            Path(name).write_bytes(contents.get(name, b""))
        (reference,) = references(plugins.with_absolute_paths_and_digests("mine.py:f", "--loss"))
        digests.add(reference.digest)
    assert len(digests) == 4


def test_two_losses_of_the_same_name_keep_their_own_files(folder):
    # The Python files are equal; only the arrays differ.
    config = started(" + ".join(save_scaled(folder / name, factor) for name, factor in (("a", 3), ("b", 5))))
    images = np.ones((1, 28, 28, 1), np.float32)
    paths = [reference.path for reference in references(config.loss)]
    assert paths == [str(folder / "run/code" / name / "scaled.py") for name in ("scaled", "scaled-2")]
    for reference, factor in zip(references(config.loss), (3, 5), strict=True):
        assert load({}, str(reference), "--loss")(images, 0 * images).numpy().tolist() == [factor]
        assert np.load(Path(reference.path).parent / "scale.npy").max() == factor


READING = 'np.load(Path(__file__).parent / "scale.npy")'
UNDECLARED = SCALED.replace('FILES = ["scale.npy"]\n', "").replace("FILES[0]", '"scale.npy"')
READ_WHEN_CALLED = UNDECLARED.replace(f"SCALE = {READING}", "").replace("SCALE *", f"{READING} *")


@pytest.mark.parametrize("source", [UNDECLARED, READ_WHEN_CALLED], ids=["read when run", "read when called"])
def test_a_file_that_is_read_but_not_in_files_is_refused_at_the_start(source, folder):
    loss = save_scaled(folder, 3, source)
    assert "FILES" not in source
    line = 1 + next(number for number, text in enumerate(source.splitlines()) if "np.load" in text)
    with pytest.raises(UsageError) as caught:
        trainer.train(replace(TINY, loss=loss), "run")
    message = str(caught.value)
    assert message.startswith(f"--loss: {folder}/scaled.py")
    assert "reads a file that is not in its FILES" in message
    assert f"line {line} " in message
    assert "\n" not in message
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "value",
    ["[3]", "3", "None", "['data/scale.npy']", "['../scale.npy']", "['/etc/passwd']", "[NAME]", "sorted(['a'])"],
)
def test_files_that_are_not_a_list_of_plain_names_are_refused_in_one_line(value, folder):
    Path("mine.py").write_text(f"NAME = 'scale.npy'\nFILES = {value}\ndef f(): ...\n")
    for refused in (lambda: load({}, "mine.py:f", "--loss"), lambda: started("mine.py:f")):
        with pytest.raises(UsageError) as caught:
            refused()
        message = str(caught.value)
        assert message.startswith("--loss: ")
        assert message.endswith("mine.py: FILES: expected a list of names of files in the same folder")
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["none.npy", "..", ".", "", "pipe"])
def test_missing_files_are_refused_in_one_line(name, folder):
    os.mkfifo("pipe")
    Path("mine.py").write_text(f"FILES = [{name!r}]\ndef f(): ...\n")
    with pytest.raises(UsageError) as caught:
        load({}, "mine.py:f", "--loss")
    assert str(caught.value) == f"--loss: {name}: cannot be read (no such file)"


@pytest.mark.slow
def test_a_run_with_files_is_resumed_and_verified_without_the_originals(folder):
    config = replace(TINY, epochs=2, bce_steps=5, loss=f"bce + 0.5*{save_scaled(folder / 'mine', 3)}")
    trainer.train(config, "whole", quiet=True)
    trainer.train(replace(config, epochs=1), "run", quiet=True)
    shutil.rmtree("mine")
    saved = config_module.read(Path("run/config.json"))
    trainer.train(replace(saved, epochs=2), "run", resume=True, quiet=True)
    assert reproducibility.first_difference(Path("run"), Path("whole")) is None
    shutil.move("run", "moved")
    for script in ("verify.py", "evaluate.py"):
        done = run_in_process(script, "moved", cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
