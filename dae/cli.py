"""From command lines to dataclasses, and from exceptions to exit statuses. Importing it does not load TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from dae import config as config_module
from dae import startup
from dae.config import PRESETS, RunConfig, preset_fields, spelled
from dae.errors import Interrupted, RunError, UsageError, warn

if TYPE_CHECKING:
    from dae.resolved import Resolved


@dataclasses.dataclass(frozen=True)
class ConfigArguments:
    """The fields of RunConfig as flags, in the groups that --help shows."""

    data: config_module.DataConfig = dataclasses.field(default_factory=config_module.DataConfig)
    noise: config_module.NoiseConfig = dataclasses.field(default_factory=config_module.NoiseConfig)
    model_and_loss: config_module.ModelConfig = dataclasses.field(default_factory=config_module.ModelConfig)
    optimization: config_module.OptimizationConfig = dataclasses.field(default_factory=config_module.OptimizationConfig)
    schedule: config_module.ScheduleConfig = dataclasses.field(default_factory=config_module.ScheduleConfig)
    runtime: config_module.RuntimeConfig = dataclasses.field(default_factory=config_module.RuntimeConfig)

    @functools.cached_property
    def config(self) -> RunConfig:
        """The configuration that the flags describe. Raises UsageError for a value out of range."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(ConfigArguments))
        return RunConfig(**{name: value for group in groups for name, value in vars(group).items()})


def _rounded(field: str, value: Any) -> str:
    """Return the flag that gives a field of RunConfig this value, with numbers of three digits."""
    return spelled(field, value, lambda item: f"{item:.3g}" if isinstance(item, float) else str(item))


# What each preset sets, for the help.
_PRESETS = "\n".join(
    ["Start from a preset: good (a first run), default, tutorial, fast, best, photo or zero_shot (docs/data.md)."]
    + [f"{name}: {' '.join(map(_rounded, fields, fields.values()))}" for name, fields in PRESETS.items() if fields]
)


@dataclasses.dataclass(frozen=True)
class PresetArguments:
    """The flags that select the configuration which all other flags override."""

    preset: Annotated[str | None, tyro.conf.arg(help=_PRESETS)] = None
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Start from a config.json, such as that of another run; what that run derived is read from resolved.json beside
    it."""


@dataclasses.dataclass(frozen=True)
class _BaseArguments(PresetArguments):
    """The flags of run.py that are not fields of RunConfig."""

    run_dir: str | None = None
    """Folder of the run; None: a new folder below runs/."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Resume the run in --run-dir; start it if there is none; do nothing if it is finished."""
    finish: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --resume: train no further, but evaluate and write the model of the epochs that are complete."""
    devices: tuple[str, ...] = ()
    """Compute on these devices, such as gpu:0 gpu:2, or cpu; none: on all GPUs, or on the CPU if there are none."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print only warnings and errors."""


@dataclasses.dataclass(frozen=True)
class RunArguments(ConfigArguments, _BaseArguments):
    """Train a denoising autoencoder."""

    @functools.cached_property
    def recorded(self) -> "Resolved | None":
        """The record of the run that is repeated or resumed, if any; without the digests of what the flags change.

        Raises UsageError if the record is damaged.
        """
        from dae import resolved  # which imports NumPy, and the help does not need it

        path = _saved_config(self)
        if path is None or not path.with_name(resolved.FILE).exists():
            return None
        recorded, saved = resolved.read(path.parent), config_module.read(path)
        # A level that was stated for noisy pictures is no estimate of it, and an estimate is recorded with the images.
        names = [*vars(self.data), *(["noise_level"] if self.config.only_noisy else [])]
        if any(getattr(saved, name) != getattr(self.config, name) for name in names):
            recorded = dataclasses.replace(recorded, data_digest="")
        if saved.start_from != self.config.start_from:
            recorded = dataclasses.replace(recorded, weights_digest="")
        return recorded

    @property
    def onednn(self) -> bool | None:
        """True or False if TensorFlow must be imported with or without oneDNN; None for its default."""
        return self.recorded.onednn if self.recorded and self.config.onednn is None else self.config.onednn


def _saved_config(arguments: _BaseArguments) -> Path | None:
    """Return the path of the config.json that the flags start from, or None."""
    if arguments.config_file is not None:
        return Path(arguments.config_file)
    path = Path(arguments.run_dir or "", "config.json")
    is_resumed = arguments.resume and arguments.run_dir is not None and arguments.preset is None
    return path if is_resumed and path.exists() else None


def parse_config(arguments_class: type, argv: list[str] | None = None) -> Any:
    """Return the command line as `arguments_class`, a subclass of ConfigArguments and PresetArguments.

    Flags override --preset or --config; without these, --resume starts from the run's own configuration, and anything
    else from the default. Prints the help and exits with 0 for --help. Raises UsageError for a mistake.
    """
    base, _ = parse(_BaseArguments, argv, add_help=False, return_unknown_args=True)
    if base.preset is not None and base.config_file is not None:
        raise UsageError("--preset and --config: give only one of them")

    def parsed(fields: Mapping[str, Any]) -> Any:
        groups = {}
        for name, default in vars(ConfigArguments()).items():
            changed = {field: fields[field] for field in vars(default) if field in fields}
            groups[name] = dataclasses.replace(default, **changed)
        return parse(arguments_class, argv, default=arguments_class(**groups))

    if path := _saved_config(base):
        return parsed(vars(config_module.read(path)))
    arguments = parsed(preset_fields(base.preset or "default"))
    if arguments.data.noisy is not None and arguments.data.clean is None:
        arguments = parsed(preset_fields(base.preset or "default", only_noisy=True))
    return arguments


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Let numbers be written as fractions, such as noise levels of 25/255."""

    def parsed(texts: list[str]) -> float:
        numerator, slash, denominator = texts[0].partition("/")
        divisor = float(denominator) if slash else 1.0
        if not divisor:
            raise ValueError("division by zero")
        return float(numerator) / divisor

    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        1, "FLOAT", parsed, lambda value: isinstance(value, float | int), lambda value: [str(value)]
    )


def parse(arguments_class: type, argv: list[str] | None = None, **options: Any) -> Any:
    """Return the command line as a dataclass; `options` are those of `tyro.cli`.

    Prints the help and exits with 0 for --help. Raises UsageError for a mistake.
    """
    captured = io.StringIO()
    # Shells expand --flag ~/path, but not --flag=~/path.
    expanded = [
        re.sub("(?<==)~(?=/|$).*", lambda path: os.path.expanduser(path[0]), argument)
        for argument in (sys.argv[1:] if argv is None else argv)
    ]
    try:
        with contextlib.redirect_stderr(captured):
            config = [tyro.conf.OmitArgPrefixes]
            return tyro.cli(arguments_class, args=expanded, config=config, registry=_registry, **options)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(_one_line(captured.getvalue())) from None


def _one_line(box: str) -> str:
    """Return tyro's error, a box with rules below its title and its message, as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", box)
    _, message, hint, *_ = re.split("[─-]{5,}", text)
    line = " ".join(message.partition("Got errors:")[0].split())  # followed by an error for each type of a union
    for title, meaning in (("Perhaps you meant:", "did you mean"), ("Argument helptext:", "allowed:")):
        if title in hint:
            line += f" ({meaning} {hint.partition(title)[2].strip().splitlines()[0].strip()})"
    return line


def import_tensorflow(onednn: bool | None = None) -> None:
    """Import TensorFlow with or without oneDNN, and set Keras's defaults."""
    if onednn is not None:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = str(int(onednn))
    startup.import_tensorflow()
    from dae import machine

    machine.set_keras()


def _warn_of_other_package(script: Path) -> None:
    """Warn if `script` is one of a checkout whose package is not the one that was imported."""
    package = Path(__file__).parent
    is_script = script.suffix == ".py" and script.is_file()  # unlike the command `dae` of an environment in a checkout
    for checkout in script.resolve().parents[1:3] if is_script else ():  # of experiments/ or a folder in it
        other = checkout / "dae"
        if (other / "cli.py").exists() and not other.samefile(package):
            warn(f"{script.name}: runs the package in {package}, not that in {other}; run: pip install -e {checkout}")


def run(main: Callable[[], object]) -> NoReturn:
    """Call a script's `main`, print a failure as one line on stderr, and exit.

    Exit status: 0 for success, 2 for a user's mistake, 1 for a failure of the run, and 128 + the number of a signal
    that stopped it: 129, 130, 138 or 143 for SIGHUP, SIGINT, SIGUSR1 or SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # So that a log file shows each epoch at once; and, as on stderr, any name of a file can be printed.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    message, run_dir, status = "", None, 0
    _warn_of_other_package(Path(sys.argv[0]))
    try:
        main()
    except UsageError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message, run_dir = 1, error.message, error.run_dir
    except OSError as error:
        status, message = 1, str(error)
    except Interrupted as stop:
        status, message, run_dir = 128 + stop.signal_number, stop.message, stop.run_dir
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    if run_dir is not None:
        message += f"; continue with --resume --run-dir {run_dir}"
    if status:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
