"""From arguments to dataclasses, and from exceptions to exit statuses. Does not load TensorFlow."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from dae import config as configs
from dae.config import PRESETS, RunConfig
from dae.errors import RunError, Stopped, UsageError, choose


@dataclasses.dataclass(frozen=True)
class _Start:
    """What decides the configuration that the other flags go over."""

    run_dir: str | None = None
    """Folder for everything that the run writes (default: a new one under runs/)."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in --run-dir; start it if there is none; do nothing if it is finished."""
    preset: str | None = None
    """Start from a named configuration: default, fast (as good in 5 epochs), tutorial or quick."""
    config: str | None = None
    """Start from a config.json, such as that of another run."""


@dataclasses.dataclass(frozen=True)
class RunArguments(_Start):
    """Train a denoising autoencoder, as the tutorial does, with a training loop of its own."""

    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write a trace of a few training steps to the run's tensorboard folder."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print warnings and errors only."""
    verbose: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print also what TensorFlow says while it starts."""
    settings: Annotated[RunConfig, tyro.conf.OmitArgPrefixes] = PRESETS["default"]


def parse_run(argv: list[str] | None = None) -> RunArguments:
    """The arguments of experiments/run.py: flags, over the configuration they start from.

    That is --preset or --config where given, else, with --resume, the run's own, else the default.
    Prints the help and exits with 0 for --help; raises UsageError for a mistake.
    """
    given, _ = parse(_Start, argv, add_help=False, return_unknown_args=True)
    if given.preset is not None and given.config is not None:
        raise UsageError("--preset and --config: give one of them")
    saved_at = Path(given.run_dir) / "config.json" if given.run_dir and given.resume else None
    saved = configs.read(saved_at) if saved_at is not None and os.path.exists(saved_at) else None
    start = saved or PRESETS["default"]
    if given.preset is not None:
        start = choose(PRESETS, given.preset, "--preset")
    elif given.config is not None:
        start = configs.read(Path(given.config))
    arguments = parse(RunArguments, argv, default=RunArguments(settings=start))
    settings = configs.pinned(arguments.settings)
    if saved is not None and given.run_dir is not None:
        settings = configs.resuming(saved, settings, Path(given.run_dir))
    return dataclasses.replace(arguments, settings=settings)


def parse(arguments_class: type, argv: list[str] | None = None, **options: Any) -> Any:
    """The command line as a dataclass; prints help and exits with 0 for --help; raises UsageError for a mistake.

    `options` are those of `tyro.cli`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments_class, args=argv, **options)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UsageError(_in_one_line(said.getvalue())) from None


def load_tensorflow(config: RunConfig, verbose: bool = False) -> RunConfig:
    """Starts TensorFlow as `config` asks for, without the dozen lines that it prints meanwhile.

    Returns `config` with what it leaves to the machine filled in. TensorFlow writes its lines past every setting of
    its own, straight to the file descriptor of stderr; they are shown with `verbose`, where the user has set
    TF_CPP_MIN_LOG_LEVEL to 0, and where the start fails.
    """
    if verbose:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    if config.onednn is not None:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = str(int(config.onednn))
    with contextlib.nullcontext() if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0" else _hidden_stderr():
        from dae import runtime

        config = runtime.settle(config)
        import tensorflow as tf

        tf.config.list_logical_devices()
    return config


@contextlib.contextmanager
def _hidden_stderr() -> Iterator[None]:
    """Keeps back what is written to the file descriptor of stderr, and shows it if the block fails."""
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except UsageError:
            raise
        except BaseException:
            hidden.seek(0)
            os.write(shown, hidden.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _in_one_line(box: str) -> str:
    """tyro's error, a box of several lines with rules between its parts, as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    # The first part is the title: above a rule where the terminal has ASCII only, else within the upper edge.
    parts = re.split(r"\n?[─-]{3,}\n?", "\n".join(lines[1:]).strip())
    first, *others = (part.split("\n") for part in parts if part)
    line = " ".join(first).partition("Got errors:")[0].strip()  # those of each type that a value may have
    for part in others:
        if part[0] in ("Perhaps you meant:", "Argument helptext:") and len(part) > 1:
            line += f" ({'did you mean' if part[0].startswith('Perhaps') else 'allowed:'} {part[1]})"
    return line


def run(main: Callable[[], object]) -> NoReturn:
    """Calls a script's `main` and leaves with 0, or with what is wrong on stderr and its status.

    2: a mistake of the user's; 1: a failure of the run; 130 and 143: stopped by SIGINT and SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a line per epoch is to be seen at once in a log file too
    try:
        main()
        status = 0
    except UsageError as error:
        status = _say(error, 2)
    except (RunError, OSError) as error:
        status = _say(error, 1)
    except Stopped as stop:
        status = _say(stop, 128 + stop.signal_number)
    except KeyboardInterrupt:
        status = _say("interrupted", 130)
    sys.exit(status)


def _say(message: object, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
