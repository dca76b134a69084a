"""Command lines to dataclasses, and exceptions to exit statuses. Importing it does not load TensorFlow."""

import contextlib
import dataclasses
import io
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from dae import config as config_module
from dae.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    OptimizationConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from dae.errors import Interrupted, RunError, UsageError, lookup


@dataclasses.dataclass(frozen=True)
class ConfigArguments:
    """The fields of RunConfig as flags, in the groups that --help shows."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    noise: NoiseConfig = dataclasses.field(default_factory=NoiseConfig)
    model_and_loss: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimization: OptimizationConfig = dataclasses.field(default_factory=OptimizationConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)

    @property
    def config(self) -> RunConfig:
        """The configuration that the flags describe. Raises UsageError for a value out of range."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(ConfigArguments))
        return RunConfig(**{name: value for group in groups for name, value in vars(group).items()})


@dataclasses.dataclass(frozen=True)
class PresetArguments:
    """The flags that select the configuration which all other flags override."""

    preset: str | None = None
    """Start from a preset: default, fast (as good as the default in 2 epochs), good and best (better networks),
    tutorial or quick (a first look)."""
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Start from a config.json, such as that of another run."""


@dataclasses.dataclass(frozen=True)
class _BaseArguments(PresetArguments):
    """The flags of run.py that are not fields of RunConfig."""

    run_dir: str | None = None
    """Folder of the run (default: a new folder below runs/)."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Resume the run in --run-dir; start it if there is none; do nothing if it is finished."""
    devices: tuple[str, ...] = ()
    """Compute on these devices, such as gpu:0 gpu:2, or cpu (default: all GPUs, or else the CPU)."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Profile a few training steps for TensorBoard's profile plugin."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print only warnings and errors."""
    verbose: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also print TensorFlow's messages at its start."""


@dataclasses.dataclass(frozen=True)
class RunArguments(ConfigArguments, _BaseArguments):
    """Train a denoising autoencoder."""


def parse_run(argv: list[str] | None = None) -> RunArguments:
    """Return the arguments of experiments/run.py, as `parse_config` does."""
    return parse_config(RunArguments, argv)


def parse_config(arguments_class: type, argv: list[str] | None = None) -> Any:
    """Return the command line as `arguments_class`, a subclass of ConfigArguments and PresetArguments.

    Flags override --preset or --config; without these, --resume starts from the run's own configuration, and anything
    else from the default. Prints the help and exits with 0 for --help. Raises UsageError for a mistake.
    """
    base, _ = parse(_BaseArguments, argv, add_help=False, return_unknown_args=True)
    saved = Path(base.run_dir or "", "config.json")
    if base.preset is not None and base.config_file is not None:
        raise UsageError("--preset and --config: give only one of them")
    if base.preset is not None:
        config = lookup(PRESETS, base.preset, "--preset")
    elif base.config_file is not None:
        config = config_module.read(Path(base.config_file))
    elif base.resume and base.run_dir and os.path.exists(saved):
        config = config_module.read(saved)
    else:
        config = PRESETS["default"]
    return parse(arguments_class, argv, default=arguments_class(**config_groups(config)))


def config_groups(config: RunConfig) -> dict[str, Any]:
    """Return the fields of ConfigArguments that describe `config`."""
    groups: dict[str, Any] = {group.name: group.default_factory for group in dataclasses.fields(ConfigArguments)}
    return {
        name: group(**{field.name: getattr(config, field.name) for field in dataclasses.fields(group)})
        for name, group in groups.items()
    }


def parse(arguments_class: type, argv: list[str] | None = None, **options: Any) -> Any:
    """Return the command line as a dataclass; `options` are those of `tyro.cli`.

    Prints the help and exits with 0 for --help. Raises UsageError for a mistake.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(arguments_class, args=argv, config=[tyro.conf.OmitArgPrefixes], **options)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(_one_line(captured.getvalue())) from None


def _one_line(box: str) -> str:
    """Return tyro's error, a box of several lines with rules between its parts, as the one line of our contract."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    # The title stands above the first rule, or, on terminals with Unicode, within the upper edge.
    parts = re.split(r"\n?[─-]{3,}\n?", "\n".join(lines[1:]).strip())
    first, *others = (part.split("\n") for part in parts if part)
    line = " ".join(first).partition("Got errors:")[0].strip()  # followed by an error for each type of a union
    for part in others:
        if part[0] in ("Perhaps you meant:", "Argument helptext:") and len(part) > 1:
            line += f" ({'did you mean' if part[0].startswith('Perhaps') else 'allowed:'} {part[1]})"
    return line


def import_tensorflow(onednn: bool | None = None, verbose: bool = False) -> None:
    """Import TensorFlow with or without oneDNN, and without the messages that it prints meanwhile.

    It writes them straight to the file descriptor of stderr, whatever TF_CPP_MIN_LOG_LEVEL says. They are shown with
    `verbose`, if that variable is 0, and if the import fails or ends the process.
    """
    if verbose:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    if onednn is not None:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = str(int(onednn))
    is_shown = os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0" or "tensorflow" in sys.modules or sys.stderr is None
    with contextlib.nullcontext() if is_shown else _stderr_hidden():
        import tensorflow as tf

        tf.config.list_physical_devices()  # looks for GPUs, and complains if there are none


# Reads stdin until a marker, or shows all of it on stderr if there is none.
_SHOW_UNLESS_MARKED = """
import os, sys
hidden = b""
while part := os.read(0, 65536):
    hidden += part
    if hidden.endswith(sys.argv[1].encode()):
        break
else:
    os.write(2, hidden)
"""


@contextlib.contextmanager
def _stderr_hidden() -> Iterator[None]:
    """Withhold what is written to the file descriptor of stderr, and show it if the block fails.

    Another process keeps it, and so shows it also if the block ends this process without an exception.
    """
    sys.stderr.flush()
    shown, marker = os.dup(2), secrets.token_hex()
    # In another session, so that Ctrl-C does not end it too.
    command = [sys.executable, "-I", "-S", "-c", _SHOW_UNLESS_MARKED, marker]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as keeper:
        assert keeper.stdin is not None
        os.dup2(keeper.stdin.fileno(), 2)
        try:
            yield
            with contextlib.suppress(OSError):  # if something has ended the other process
                os.write(2, marker.encode())
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def run(main: Callable[[], object]) -> NoReturn:
    """Call a script's `main`, print a failure as one line on stderr, and exit.

    Exit status: 0 for success, 2 for a user's mistake, 1 for a failure of the run, 130, 143 and 138 after SIGINT,
    SIGTERM and SIGUSR1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that a log file shows each epoch at once; and, as on stderr, any name of a file can be printed.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
        status = 0
    except UsageError as error:
        status = _fail(error, 2)
    except (RunError, OSError) as error:
        status = _fail(error, 1)
    except Interrupted as interruption:
        status = _fail(interruption, 128 + interruption.signal_number)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    sys.exit(status)


def _fail(message: object, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
