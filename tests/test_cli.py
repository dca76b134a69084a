import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import EXPERIMENTS, run_in_process, run_subprocess

from dae import cli
from dae.config import PRESETS, RunConfig, flag
from dae.errors import UsageError


def parse(line: str) -> cli.RunArguments:
    return cli.parse_run(line.split())


def test_no_arguments_give_the_default_config():
    arguments = parse("")
    assert arguments.config == RunConfig()
    assert (arguments.run_dir, arguments.resume) == (None, False)


def test_flags_override_the_preset():
    assert parse("--preset tutorial").config == RunConfig(validation_examples=0, initial_brightness=0.5)
    assert parse("--preset tutorial --epochs 2 --noise-level 0.3 --no-clip-noise").config == RunConfig(
        validation_examples=0, initial_brightness=0.5, epochs=2, noise_level=0.3, clip_noise=False
    )


def test_a_flag_that_only_the_preset_allows_overrides_it():
    with pytest.raises(UsageError, match="--warmup-ratio"):
        assert parse("--warmup-ratio 0.1").config
    assert parse("--preset fast --warmup-ratio 0.1").config == replace(PRESETS["fast"], warmup_ratio=0.1)


@dataclasses.dataclass(frozen=True)
class OtherArguments(cli.ConfigArguments, cli.PresetArguments):
    """Arguments of another script than run.py."""

    losses: tuple[str, ...] = ()
    seeds: int = 5


def test_presets_and_config_files_work_in_other_scripts(tmp_path):
    """Flags that only the other script has do not disturb the search for --preset and --config."""
    arguments = cli.parse_config(OtherArguments, ["--losses", "bce", "mse", "--preset", "fast", "--seeds", "3"])
    assert (arguments.losses, arguments.seeds) == (("bce", "mse"), 3)
    assert arguments.config == PRESETS["fast"]
    arguments = cli.parse_config(OtherArguments, ["--epochs", "1", "--losses", "bce", "--preset", "fast"])
    assert arguments.config == replace(PRESETS["fast"], epochs=1)
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    arguments = cli.parse_config(OtherArguments, ["--config", f"{tmp_path}/config.json", "--seed", "1"])
    assert (arguments.config, arguments.losses) == (RunConfig(epochs=4, seed=1), ())
    assert cli.parse_config(OtherArguments, []).config == RunConfig()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--preset fsat", ["--preset", "did you mean 'fast'"]),
        ("--resume", ["--resume"]),  # a flag of run.py only
        ("--preset fast --seedz 3", ["--seedz", "did you mean --seed"]),
    ],
)
def test_a_mistake_in_another_script_is_reported_in_one_line(line, words):
    with pytest.raises(UsageError) as caught:
        cli.parse_config(OtherArguments, line.split())
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_config_groups_describe_the_whole_config(preset):
    assert cli.ConfigArguments(**cli.config_groups(PRESETS[preset])).config == PRESETS[preset]


def test_flags_override_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    assert parse(f"--config {tmp_path}/config.json --seed 1").config == RunConfig(epochs=4, seed=1)


def test_a_resume_starts_from_the_saved_config_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    assert parse(f"--resume --run-dir {tmp_path}").config == RunConfig(epochs=4, seed=9)
    assert parse(f"--resume --run-dir {tmp_path}/none").config == RunConfig()


def test_one_or_two_values_are_accepted_where_a_field_allows_both():
    assert parse("--noise-level 1 --image-size 28").config == RunConfig(noise_level=1.0, image_size=28)
    assert parse("--noise-level 0 1 --image-size 28 32").config == RunConfig(noise_level=(0, 1), image_size=(28, 32))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--losss bce", ["--losss", "did you mean --loss "]),
        ("--epochs x", ["--epochs", "'x'", "INT"]),
        ("--epochs 0", ["--epochs", "got 0"]),
        ("--epochs 2.5", ["--epochs", "'2.5'", "INT"]),
        ("--noise-level 1 2 3", ["--noise-level", "'1', '2', '3'", "FLOAT|{FLOAT FLOAT}"]),
        ("--epochs", ["--epochs", "Missing"]),
        ("words", ["words"]),
        ("--preset tutrial", ["--preset", "'tutrial'", "did you mean 'tutorial'", "default"]),
        ("--preset quick --config x.json", ["--preset", "--config"]),
        ("--config none.json", ["none.json", "no such file"]),
    ],
)
def test_a_mistake_is_reported_in_one_line(line, words):
    with pytest.raises(UsageError) as caught:
        assert parse(line).config
    for word in words:
        assert word in str(caught.value)
    assert not set("\n│─╭╰\x1b") & set(str(caught.value))


def test_a_mistake_is_reported_in_one_line_by_an_ascii_terminal():
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / "run.py", "--losss", "x"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("run.py: ")
    assert "did you mean --loss " in done.stderr
    assert done.stderr.count("\n") == 1
    assert "---" not in done.stderr


def groups_of_help(text: str) -> dict[str, list[str]]:
    """Return the flags in each group of tyro's help, by its title. The groups are boxes if stdout is UTF-8."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"(?:╭─)? (?:(\S+) )?options ", line):
            flags = groups.setdefault(title[1] or "", [])
        elif one := re.match(r"[│ ] (?:-h, )?(--[a-z][a-z0-9-]*)", line):
            flags.append(one[1])
    return groups


def test_help_shows_every_field_of_the_config_in_one_of_six_groups(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert not exit.value.code
    text = capsys.readouterr().out
    groups = groups_of_help(text)
    others = groups.pop("")
    assert list(groups) == ["data", "noise", "model-and-loss", "optimization", "schedule", "runtime"]
    shown = [each for flags in groups.values() for each in flags]
    assert sorted(shown) == sorted(
        flag(name) for name in RunConfig.__dataclass_fields__ if not name.endswith("_digest")
    )
    for group, expected in {
        "data": ["--dataset", "--data", "--validation-examples"],
        "noise": ["--noise", "--noise-level", "--clip-noise"],
        "model-and-loss": ["--model", "--loss"],
        "optimization": ["--optimizer", "--learning-rate", "--batch-size"],
        "schedule": ["--epochs", "--schedule"],
        "runtime": ["--seed", "--shards"],
    }.items():
        assert set(expected) <= set(groups[group]), group
    assert {"--run-dir", "--resume", "--preset", "--config", "--quiet"} <= set(others)
    for preset in PRESETS:
        assert preset in text


def test_help_shows_the_values_of_the_preset_as_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--preset fast --help")
    assert "(default: soap)" in capsys.readouterr().out


def test_parsing_does_not_import_tensorflow():
    code = "import sys; from dae import cli; cli.parse_run([]); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def check_mistake(done: subprocess.CompletedProcess, folder) -> None:
    """Check that a script has failed with status 2 and one line, and has written no file."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("run.py: ")
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--losss", "x"], ["--resume"], ["--run-dir", "/proc/1/none"], ["--run-dir", "x" * 300]]
)
def test_a_mistake_exits_with_2_and_writes_no_file(arguments, tmp_path):
    check_mistake(run_in_process("run.py", *arguments, cwd=tmp_path), tmp_path)


def test_a_mistake_found_by_tensorflow_code_is_reported_in_one_line(tmp_path):
    """In a separate process, since TensorFlow writes to the file descriptor of stderr."""
    done = run_subprocess("run.py", "--loss", "bcee", cwd=tmp_path)
    check_mistake(done, tmp_path)
    assert "did you mean 'bce'" in done.stderr


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("pass", 0),
        ("os._exit(1)", 1),
        ("os.abort()", -signal.SIGABRT),
        ("ctypes.string_at(0)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise ImportError", 1),
        ("sys.exit(3)", 3),
    ],
)
def test_hidden_output_is_shown_if_the_process_does_not_survive(ending, status):
    code = f"""
import ctypes, os, signal, sys
from dae import cli
with cli._stderr_hidden():
    os.write(2, b"x" * 100_000 + b"the reason\\n")
    {ending}
os.write(2, b"afterwards\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert ("x" * 100_000 + "the reason\n" in done.stderr) == (status != 0)
    assert ("afterwards\n" in done.stderr) == (status == 0)
    if status == 0:
        assert done.stderr == "afterwards\n"


def test_ctrl_c_while_output_is_hidden_shows_it_without_a_second_traceback():
    code = "import os, signal, time\nfrom dae import cli\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    code += "with cli._stderr_hidden():\n    time.sleep(0.2)\n    os.killpg(0, signal.SIGINT)\n    time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("Traceback") == 1


def test_a_fatal_message_of_tensorflow_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "--nonsense=1")
    done = run_subprocess("run.py", cwd=tmp_path)
    assert done.returncode not in (0, 2)
    assert "TF_XLA_FLAGS: --nonsense=1" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--quiet"], []])
def test_a_resume_that_trains_on_prints_nothing_on_stderr(flags, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    epochs = 1 + json.loads((tiny_run / "config.json").read_text())["epochs"]
    done = run_subprocess("run.py", "--resume", "--run-dir", "run", "--epochs", epochs, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (not flags)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == epochs


@pytest.mark.slow
def test_a_run_without_run_dir_gets_a_readable_new_name(tmp_path):
    (tmp_path / "runs" / "mnist-conv-bce").mkdir(parents=True)
    done = run_subprocess("run.py", "--train-examples", 64, "--validation-examples", 64, "--epochs", 1, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "encoder (MaxPooling2D)" in done.stdout
    assert "epoch 1/1: train loss" in done.stdout
    assert (tmp_path / "runs" / "mnist-conv-bce-2" / "report.json").exists()


def test_a_run_that_fails_exits_with_1(tmp_path):
    done = run_in_process("run.py", "--learning-rate", "1e38", "--train-examples", "600", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "finite" in done.stderr
    assert "--learning-rate" in done.stderr
    assert "Traceback" not in done.stderr
