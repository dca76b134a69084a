import builtins
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, run_here, run_script
from hypothesis import given
from hypothesis import strategies as st

from dae import cli, plugins
from dae import config as configs
from dae.analysis import reproducibility
from dae.config import RunConfig
from dae.errors import UsageError
from dae.plugins import choose, distinct, label, references
from dae.training import trainer

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
    """The current folder, with two files of the user's own."""
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(LOSSES)
    Path("my_noise.py").write_text(NOISE)
    return tmp_path


NAMES = st.lists(st.sampled_from(["a", "b", "a-2", "a-3"]))


@given(NAMES)
def test_names_are_made_distinct_and_first_ones_stay_as_they_are(names):
    made = distinct(names)
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


def test_a_function_of_a_file_is_loaded_and_the_same_text_runs_once(folder):
    Path("counting.py").write_text("import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\ndef f(): ...\n")
    table: dict[str, Any] = {}
    assert choose(table, "counting.py:f", "--loss") is choose(table, "counting.py:f", "--loss")
    assert vars(builtins).pop("runs") == 1
    assert not Path("__pycache__").exists()
    Path("counting.py").write_text("def f(): return 2\n")
    assert choose(table, "counting.py:f", "--loss")() == 2


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "none.py:f", "--loss: none.py: cannot be read (no such file)"),
        ("def f(: ...", "mine.py:f", "--loss: mine.py: fails in line 1 (SyntaxError: "),
        ("\n\nimport nonesuch", "mine.py:f", "--loss: mine.py: fails in line 3 (ModuleNotFoundError: No module"),
        ("import sys\nsys.exit(3)", "mine.py:f", "--loss: mine.py: fails in line 2 (SystemExit: 3)"),
        ("raise ValueError()", "mine.py:f", "--loss: mine.py: fails in line 1 (ValueError)"),
        ("\0", "mine.py:f", "--loss: mine.py: fails ("),
        ("def my_loss(): ...", "mine.py:my_los", "--loss: mine.py: has no function 'my_los'; did you mean 'my_loss'?"),
        ("x = 3", "mine.py:x", "--loss: mine.py: has no function 'x' (it has: none)"),
        ("", "mine.py", "--loss: unknown name 'mine.py' (known: bce, or FILE.py:FUNCTION of your own)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(content, name, message, folder):
    Path("mine.py").write_text(content)
    with pytest.raises(UsageError) as caught:
        choose({"bce": len}, name, "--loss")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_run_keeps_the_files_and_names_them_by_their_digests_and_another_folder_reruns_it(folder, tmp_path):
    config = replace(TINY, epochs=1, loss="my_losses.py:fourth_power", noise="my_noise.py:darker")
    trainer.train(config, "run")
    assert Path("run/code/my_losses.py").read_text() == LOSSES
    assert Path("run/code/my_noise.py").read_text() == NOISE
    saved = json.loads(Path("run/config.json").read_text())
    digest = subprocess.run(["sha256sum", "my_losses.py"], capture_output=True, text=True).stdout.split()[0]
    assert saved["loss"] == f"code/my_losses.py:fourth_power@{digest}"

    # Nothing but the run's own folder is needed to have it again, wherever that lies by now.
    for file in ("my_losses.py", "my_noise.py"):
        os.remove(file)
    shutil.move("run", "moved + renamed")
    done = run_script("verify.py", "moved + renamed", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_here("evaluate.py", "moved + renamed", cwd=folder)
    assert done.returncode == 0, done.stderr

    # What is not the text that was trained with is refused before it is run.
    kept = Path("moved + renamed/code/my_losses.py")
    kept.write_text(LOSSES + "\nopen('was run', 'w')\n")
    done = run_here("verify.py", "moved + renamed", cwd=folder)
    assert done.returncode == 2
    assert f"--loss: {kept.absolute()}: its text is not what the run was made with (SHA-256 " in done.stderr
    assert not Path("was run").exists()


def test_the_line_that_began_a_run_resumes_it_with_its_own_copy(folder):
    def line(text: str) -> RunConfig:
        return cli.parse_run([*text.split(), "--run-dir", "run", "--resume"]).settings

    sizes = "--train-examples 64 --validation-examples 64 --epochs"
    began = line(f"--loss my_losses.py:fourth_power {sizes} 1")
    assert references(began.loss)[0].path == str(folder / "my_losses.py")
    trainer.train(began, "run")
    again = line(f"--loss my_losses.py:fourth_power {sizes} 2")
    assert references(again.loss)[0].path == str(folder / "run" / "code" / "my_losses.py")

    Path("my_losses.py").write_text(LOSSES + "# another text\n")
    with pytest.raises(UsageError, match=r"--loss: .*my_losses.py: not the text that run was begun with; leave --loss"):
        line("--loss my_losses.py:fourth_power")
    with pytest.raises(UsageError, match=r"another run .--loss was '.*', now 'bce'"):
        line("--loss bce")
    trainer.train(line("--epochs 2"), "run", resume=True)
    assert Path("run/code/my_losses.py").read_text() == LOSSES

    os.remove("my_losses.py")
    trainer.train(configs.read(Path("run/config.json")), "again")
    assert reproducibility.first_difference(Path("run"), Path("again")) is None


def test_two_files_of_one_name_are_both_kept(folder):
    Path("other").mkdir()
    Path("other/my_noise.py").write_text(LOSSES)
    config = replace(TINY, epochs=1, loss="other/my_noise.py:fourth_power", noise="my_noise.py:darker")
    trainer.train(config, "run")
    kept = configs.read(Path("run/config.json"))
    assert [Path(plugins.references(text)[0].path).name for text in (kept.noise, kept.loss)] == [
        "my_noise.py",
        "my_noise-2.py",
    ]
    assert Path("run/code/my_noise-2.py").read_text() == LOSSES


def test_a_run_is_named_after_the_function(folder):
    trainer.train(replace(TINY, train_examples=64, epochs=1, loss="my_losses.py:fourth_power"))
    assert [path.name for path in Path("runs").iterdir()] == ["mnist-conv-fourth_power"]
    assert label("bce + 0.1*/a/my_losses.py:fourth_power@" + "0" * 64) == "bce + 0.1*fourth_power"


@pytest.mark.parametrize("wrong", ["my_losses.py:fourth", "none.py:f", "my_noise.py:darker"])
def test_a_mistake_is_found_before_anything_is_written(wrong, folder):
    with pytest.raises(UsageError, match="--loss"):
        trainer.train(replace(TINY, loss=wrong), "run")
    assert not Path("run").exists()


def test_parsing_a_file_of_the_users_own_does_not_load_tensorflow(folder):
    code = "import sys; from dae import command_line; cli.parse_run(sys.argv[1:]); "
    code += "sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "--loss", "my_losses.py:fourth_power"]).returncode == 0
