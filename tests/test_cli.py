import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import EXPERIMENTS, run_here, run_script

from dae import cli
from dae.config import PRESETS, RunConfig
from dae.errors import UsageError


def parse(line: str) -> cli.RunArguments:
    return cli.parse_run(line.split())


def test_no_arguments_are_the_default_run():
    arguments = parse("")
    assert arguments.settings == RunConfig()
    assert (arguments.run_dir, arguments.resume) == (None, False)


def test_flags_go_over_the_preset():
    assert parse("--preset tutorial").settings == RunConfig(validation_examples=0)
    assert parse("--preset tutorial --epochs 2 --noise-level 0.3 --no-clip-noise").settings == RunConfig(
        validation_examples=0, epochs=2, noise_level=0.3, clip_noise=False
    )


def test_flags_that_only_a_preset_allows_go_over_it():
    assert parse("--preset fast --warmup-ratio 0.1").settings == replace(PRESETS["fast"], warmup_ratio=0.1)


def test_flags_go_over_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    assert parse(f"--config {tmp_path}/config.json --seed 1").settings == RunConfig(epochs=4, seed=1)


def test_a_resume_starts_from_the_runs_own_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    assert parse(f"--resume --run-dir {tmp_path}").settings == RunConfig(epochs=4, seed=9)
    assert parse(f"--resume --run-dir {tmp_path}/none").settings == RunConfig()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--losss bce", "Unrecognized options: --losss, bce (did you mean --loss STR)"),
        ("--epochs x", "Error parsing --epochs: invalid literal for int() with base 10: 'x' (allowed: --epochs INT)"),
        ("--epochs 0", "--epochs: 0 is not a whole number from 1 to a million"),
        (
            "--noise-level 1 2 3",
            "Error parsing --noise-level: no type matching FLOAT|{FLOAT FLOAT} could be instantiated from "
            "['1', '2', '3']. (allowed: --noise-level FLOAT|{FLOAT FLOAT})",
        ),
        ("--epochs", "Missing value for argument '--epochs'. Expected 1 values."),
        ("words", "Unrecognized options: words"),
        ("--preset tutrial", "--preset: unknown name 'tutrial'; did you mean 'tutorial'? (known: "),
        ("--preset quick --config x.json", "--preset and --config: give one of them"),
        ("--config none.json", "none.json: cannot be read"),
    ],
)
def test_a_mistake_gets_one_clear_line(line, message):
    with pytest.raises(UsageError) as caught:
        parse(line)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_line_is_as_clear_where_the_terminal_has_only_ascii(tmp_path):
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / "run.py", "--losss", "x"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "run.py: Unrecognized options: --losss, x (did you mean --loss STR)\n"


def test_the_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert not leaving.value.code
    said = capsys.readouterr().out
    for name in RunConfig.__dataclass_fields__.keys() - {"data_digest"}:
        assert "--" + name.replace("_", "-") in said
    for preset in PRESETS:
        assert preset in said


def test_parsing_does_not_load_tensorflow():
    code = "import sys; from dae import command_line; cli.parse_run([]); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [["--losss", "x"], ["--resume"], ["--loss", "bcee"], ["--run-dir", "/proc/1/none"], ["--run-dir", "x" * 300]],
)
def test_a_mistake_exits_with_2_and_writes_one_line_and_no_file(arguments, tmp_path):
    done = run_script("run.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("run.py: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_script_names_its_run_readably_in_the_current_folder(tmp_path):
    (tmp_path / "runs" / "mnist-conv-bce").mkdir(parents=True)
    done = run_script("run.py", "--train-examples", 64, "--validation-examples", 64, "--epochs", 1, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "encoder (MaxPooling2D)" in done.stdout
    assert "epoch 1/1: train loss" in done.stdout
    assert (tmp_path / "runs" / "mnist-conv-bce-2" / "report.json").exists()


def test_a_run_that_fails_exits_with_1(tmp_path):
    done = run_here("run.py", "--learning-rate", "1e38", "--train-examples", "600", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "is not finite" in done.stderr
    assert "Traceback" not in done.stderr
