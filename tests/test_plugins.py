import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RESOLVED, TINY, rejected, run_in_process
from hypothesis import given
from hypothesis import strategies as st
from runs import config_of

from dae import cli
from dae import config as config_module
from dae.config import RunConfig
from dae.errors import UsageError
from dae.plugins import Reference, load, substitute, unique_names, with_absolute_paths_and_digests
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


def references(text: str) -> list[Reference]:
    """Return all references in the text of a setting, in order."""
    found: list[Reference] = []
    substitute(text, found.append)
    return found


NAMES = st.lists(st.sampled_from(["a", "b", "a-2", "a-3"]))


@given(NAMES)
def test_unique_names_are_unique_and_change_only_repeated_names(names):
    made = unique_names(names)
    assert len(set(made)) == len(names)
    assert all(unique.startswith(name) for unique, name in zip(made, names, strict=True))
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
    assert [(reference.path, reference.function) for reference in references(text)] == expected
    assert substitute(text, lambda reference: reference) == text


def test_a_file_runs_once_for_each_digest(folder):
    source = "with open('log', 'a') as log:\n    log.write('run ')\ndef f(): return {}\n"
    for number in (1, 2):
        Path("counting.py").write_text(source.format(number))
        text = with_absolute_paths_and_digests("counting.py:f", "--loss")
        assert load({}, text, "--loss") is load({}, text, "--loss")
        assert load({}, text, "--loss")() == number
        assert Path("log").read_text() == "run " * number
    assert not Path("__pycache__").exists()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "none.py:f", ["none.py", "no such file"]),
        ("def f(: ...", "mine.py:f", ["mine.py", "line 1", "SyntaxError: "]),
        ("\n\nimport nonesuch", "mine.py:f", ["mine.py", "line 3 ", "ModuleNotFoundError: ", "nonesuch"]),
        ("import sys\nsys.exit(3)", "mine.py:f", ["mine.py", "line 2 ", "SystemExit: 3"]),
        ("raise ValueError()", "mine.py:f", ["mine.py", "line 1 ", "(ValueError)"]),
        ("\0", "mine.py:f", ["mine.py", "fails ("]),
        ("def my_loss(): ...", "mine.py:my_los", ["mine.py", "'my_los'", "did you mean 'my_loss'?"]),
        ("x = 3", "mine.py:x", ["mine.py", "'x'"]),
        ("", "mine.py", ["'mine.py'", "bce", "FILE.py:FUNCTION"]),
        *(
            (f"NAME = 'a'\nFILES = {value}\ndef f(): ...", "mine.py:f", ["mine.py: FILES: expected a list of names"])
            for value in ("[3]", "3", "None", "['data/a.npy']", "['../a']", "['/etc/passwd']", "[NAME]", "sorted('a')")
        ),
        *(
            (f"FILES = [{name!r}]\ndef f(): ...", "mine.py:f", [f"{name}: cannot be read (no such file)"])
            for name in ("none.npy", "..", ".", "", "pipe")
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_in_one_line(content, name, words, folder):
    Path("mine.py").write_text(content)
    os.mkfifo("pipe")
    with rejected("--loss: ", *words):
        load({"bce": len}, name, "--loss")


def started(loss: str) -> RunConfig:
    """Return the configuration of a run in the folder `run` once it is written, with the paths of its copies."""
    with workdir.opened("run", replace(TINY, loss=loss), resume=False) as run:
        workdir.start(run.path, run.config, RESOLVED)
    return config_module.read(Path("run/config.json"))


def save_scaled(folder: Path, factor: float, source: str = SCALED) -> str:
    """Write a loss with an array beside it, and return the loss's name."""
    folder.mkdir(exist_ok=True)
    (folder / "scaled.py").write_text(source)
    np.save(folder / "scale.npy", np.array([factor], np.float32))
    return f"{folder}/scaled.py:scaled"


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
def test_an_edit_of_any_kept_file_is_rejected_before_it_is_run(name, folder):
    config = started(save_scaled(folder, 3))
    kept = Path("run/code/scaled", name)
    kept.write_bytes(kept.read_bytes() + (b"\nopen('was run', 'w')\n" if name == "scaled.py" else b"0"))
    with pytest.raises(UsageError, match=r"^--loss: .*/run/code/scaled/scaled\.py: differs from what .*SHA-256"):
        load({}, config.loss, "--loss")
    assert not Path("was run").exists()


def test_the_digest_covers_which_file_has_which_content(folder):
    files = {"a": b"1", "b": b"23"}
    digests = set()
    for contents in (files, {"a": b"12", "b": b"3"}, {"a": b"23", "b": b"1"}, {"a": b"1"}):
        Path("mine.py").write_text(f"FILES = {sorted(files)}\ndef f(): ...\n")
        for name in files:
            Path(name).write_bytes(contents.get(name, b""))
        (reference,) = references(with_absolute_paths_and_digests("mine.py:f", "--loss"))
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


def test_later_edits_have_no_effect_on_a_function_that_was_loaded_with_its_digest(folder):
    """A run loads its functions again and again, with the same text."""
    text = with_absolute_paths_and_digests("my_losses.py:fourth_power", "--loss")
    function: Any = load({}, text, "--loss")
    for change in (
        lambda: Path("my_losses.py").write_text("# edited\n" * 9 + LOSSES),
        lambda: os.remove("my_losses.py"),
    ):
        change()
        assert load({}, text, "--loss") is function
        # TensorFlow makes graphs of the source code.
        assert inspect.getsource(function).startswith("def fourth_power(clean, denoised):\n    return tf.reduce_mean(")


def test_a_resume_takes_the_copy_in_the_run_and_rejects_another_file(folder):
    def parse(line: str) -> RunConfig:
        return cli.parse_config(cli.RunArguments, [*line.split(), "--run-dir", "run", "--resume"]).config

    loss = save_scaled(folder / "mine", 3)
    started(loss)
    requested = replace(TINY, loss=loss)
    save_scaled(folder / "mine", 4)
    edited = replace(TINY, loss=loss)
    shutil.rmtree("mine")
    for config in (requested, parse("")):
        with workdir.opened("run", config, resume=True) as run:
            assert references(run.config.loss)[0].path == str(folder / "run/code/scaled/scaled.py")
    for config, now in ((edited, ".*mine/scaled.py:scaled@.*"), (parse("--loss bce"), "bce")):
        with pytest.raises(UsageError, match=rf"--loss was '.*', now '{now}'"), workdir.opened("run", config, True):
            pass


@pytest.mark.slow
def test_a_run_needs_nothing_but_its_folder_and_data_to_be_resumed_verified_and_evaluated(folder, files):
    loss = f"bce + 0.5*{save_scaled(folder / 'mine', 3)}"
    config = config_of(files, bce_steps=5, loss=loss, noise="my_noise.py:darker", noise_level=0.5)
    trainer.train(replace(config, epochs=1), "run", quiet=True)
    shutil.rmtree("mine")
    os.remove("my_noise.py")
    saved = config_module.read(Path("run/config.json"))
    trainer.train(replace(saved, epochs=2), "run", resume=True, quiet=True)
    shutil.move("run", "moved + renamed")
    for script in ("verify.py", "evaluate.py"):
        done = run_in_process(script, "moved + renamed", cwd=folder)
        assert done.stderr == ""
