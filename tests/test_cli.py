import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import EXPERIMENTS, TINY, run_subprocess

import dae
from dae import cli
from dae.__main__ import COMMANDS, main
from dae.config import PRESETS, RunConfig, flag, preset, to_json
from dae.errors import Interrupted, RunError, UsageError


def parse(line: str) -> cli.RunArguments:
    return cli.parse_config(cli.RunArguments, line.split())


def test_no_arguments_give_the_default_config():
    arguments = parse("")
    assert (arguments.config, arguments.run_dir, arguments.resume) == (RunConfig(), None, False)
    assert (arguments.recorded, arguments.onednn) == (None, None)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_its_config_and_flags_override_it(name):
    assert parse(f"--preset {name}").config == preset(name)
    changed = parse(f"--preset {name} --epochs 9 --noise-level 0.3 --no-clip-noise").config
    assert changed == preset(name, epochs=9, noise_level=0.3, clip_noise=False)


def test_a_flag_that_only_the_preset_allows_overrides_it():
    assert parse("--preset fast --warmup-ratio 0.1").config == preset("fast", warmup_ratio=0.1)


@dataclasses.dataclass(frozen=True)
class OtherArguments(cli.ConfigArguments, cli.PresetArguments):
    """Arguments of another script than run.py."""

    losses: tuple[str, ...] = ()
    seeds: int = 5


def parse_other(line: str) -> OtherArguments:
    return cli.parse_config(OtherArguments, line.split())


def test_presets_and_config_files_work_in_other_scripts(tmp_path):
    """Flags that only the other script has do not disturb the search for --preset and --config."""
    arguments = parse_other("--losses bce mse --preset fast --seeds 3")
    assert (arguments.losses, arguments.seeds, arguments.config) == (("bce", "mse"), 3, preset("fast"))
    assert parse_other("--epochs 1 --losses bce --preset fast").config == preset("fast", epochs=1)
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 4, "seed": 9}))
    assert parse_other(f"--config {tmp_path}/config.json --seed 1").config == RunConfig(epochs=4, seed=1)
    assert parse_other("").config == RunConfig()


def test_a_resume_starts_from_the_config_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text(to_json(replace(TINY, seed=9)))
    assert parse(f"--resume --run-dir {tmp_path}").config == replace(TINY, seed=9)
    assert parse(f"--resume --run-dir {tmp_path}/none").config == RunConfig()


@pytest.mark.parametrize("preset_name", ["photo", "fast"])
def test_noisy_pictures_alone_have_no_noise_level_of_a_preset(preset_name):
    alone, pairs = preset(preset_name, noisy="in"), preset(preset_name, noisy="in", clean="c")
    assert (alone.noise_level, pairs.noise_level) == (None, PRESETS[preset_name].get("noise_level"))
    for flags in ("--noisy in", "--noisy in --clean None", "--noisy=in"):
        assert parse(f"--preset {preset_name} {flags}").config == alone
    assert parse(f"--preset {preset_name} --noisy in --clean c").config == pairs


def test_one_or_two_values_are_accepted_where_a_field_allows_both():
    assert parse("--noise-level 1 --image-size 28").config == RunConfig(noise_level=1.0, image_size=28)
    assert parse("--noise-level 0 1 --image-size 28 32").config == RunConfig(noise_level=(0, 1), image_size=(28, 32))


def test_a_mistake_is_reported_in_one_line_by_an_ascii_terminal():
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / "run.py", "--losss", "x"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "run.py: Unrecognized options: --losss, x (did you mean --loss STR)\n"


def groups_of_help(text: str) -> dict[str, list[str]]:
    """Return the flags in each group of tyro's help, by its title. The groups are boxes if stdout is UTF-8."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"(?:╭─)? (?:(\S+) )?options ", line):
            flags = groups.setdefault(title[1] or "", [])
        elif one := re.match(r"[│ ] (?:-h, )?(--[a-z][a-z0-9-]*)", line):
            flags.append(one[1])
    return groups


def test_help_shows_every_field_in_one_of_six_groups_the_defaults_of_the_preset_and_what_each_sets(capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        parse("--preset fast --help")
    assert not exit.value.code
    text = capsys.readouterr().out
    groups = groups_of_help(text)
    others = groups.pop("")
    assert list(groups) == ["data", "noise", "model-and-loss", "optimization", "schedule", "runtime"]
    shown = [name for flags in groups.values() for name in flags]
    assert sorted(shown) == sorted(map(flag, RunConfig.__dataclass_fields__))
    assert {"--run-dir", "--resume", "--preset", "--config", "--quiet"} <= set(others)
    assert all(name in text for name in PRESETS)
    assert "(default: soap)" in text
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse("--help")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "photo: " in line)
    for part in ("--model residual_unet", "--noise-level 0 0.216", "--no-clip-noise", "--augment ", "--epochs 30"):
        assert part in line


def test_what_is_written_to_a_muted_stderr_is_dropped_and_later_messages_are_not():
    code = """
import os
from dae import errors
with errors.muted_stderr():
    os.write(2, b"dropped")
os.write(2, b"afterwards")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "afterwards")


@pytest.mark.slow
def test_a_variable_shows_the_message_with_which_tensorflow_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "--nonsense=1")
    for level in ("2", "0"):
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
        done = run_subprocess("run.py", cwd=tmp_path, status=1)
        assert ("TF_XLA_FLAGS: --nonsense=1" in done.stderr) == (level == "0")
    assert list(tmp_path.iterdir()) == []


def run_dae(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dae", *arguments], cwd=cwd, capture_output=True, text=True)


def test_dae_lists_its_commands_without_importing_numpy_or_tensorflow(tmp_path, monkeypatch):
    for name in ("numpy", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(EXPERIMENTS.parent)]))
    for arguments in ([], ["--help"]):
        done = run_dae(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall(r"^  (\w+) +\S", done.stdout, re.MULTILINE) == list(COMMANDS)
    assert run_dae("--version").stdout == f"dae {dae.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_itself_in_its_help_and_messages(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argument, status in (("--help", 0), ("--nonsense", 2)):
        monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", name, argument])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == status
        shown = capsys.readouterr()
        assert (shown.err or shown.out).startswith(f"dae {name}: " if status else f"usage: dae {name} [-h]")
        for described in re.split(r"\n[│ ] --[a-z]", shown.out):
            assert described.count("(default: ") <= 1


def test_an_unknown_command_is_reported_with_the_most_similar_one():
    done = run_dae("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dae: COMMAND: unknown name 'trian'; did you mean 'train'? (known: train, ")
    assert done.stderr.count("\n") == 1


def test_a_script_warns_if_its_checkout_holds_another_package_than_the_one_that_it_imports(tmp_path):
    for name in ("dae/cli.py", "experiments/run.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(EXPERIMENTS.parent / name, tmp_path / name)
    package = Path(dae.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, str(tmp_path / "experiments" / "run.py"), "--epochs", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    warning = f"run.py: runs the package in {package}, not that in {tmp_path}/dae; run: pip install -e {tmp_path}"
    assert done.stderr.splitlines()[0] == f"warning: {warning}"
    assert (done.returncode, done.stderr.count("\n")) == (2, 2)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (UsageError("--epochs: 0"), 2),
        (RunError("the loss is not finite"), 1),
        (OSError(28, "No space left on device"), 1),
        *((Interrupted(number, "saved"), 128 + number) for number in (1, 2, 10, 15)),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exceptions_become_one_line_and_an_exit_status(error, status, capsys):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == status
    assert capsys.readouterr().err.count("\n") == (error is not None)


@pytest.mark.parametrize(
    ("line", "level"),
    [("25/255", 25 / 255), ("0 55/255", (0.0, 55 / 255)), ("0.1", 0.1), ("1", 1.0), ("12.75/255", 0.05)],
)
def test_numbers_can_be_written_as_fractions_and_are_recorded_as_numbers(line, level):
    config = parse(f"--noise-level {line}").config
    assert config.noise_level == level
    recorded = json.loads(to_json(config))["noise_level"]
    assert recorded == (list(level) if isinstance(level, tuple) else level)


@pytest.mark.parametrize("text", ["1/0", "25/", "/255", "1/2/3", "a/b"])
def test_fractions_that_are_not_numbers_are_rejected(text):
    with pytest.raises(UsageError, match="--noise-level"):
        parse(f"--noise-level {text}")
