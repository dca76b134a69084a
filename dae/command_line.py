"""From arguments to dataclasses, and from exceptions to exit statuses. Does not load TensorFlow."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from dae import config as configs
from dae.config import PRESETS, RunConfig
from dae.errors import RunError, Stopped, UsageError, choose

Arguments = TypeVar("Arguments")


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """Train a denoising autoencoder, as the tutorial does, with a training loop of its own."""

    run_dir: str | None = None
    """Folder for everything that the run writes (default: a new one under runs/)."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in --run-dir; start it if there is none; do nothing if it is finished."""
    preset: str | None = None
    """Start from a named configuration: default, tutorial (all 60,000 images train) or quick."""
    config: str | None = None
    """Start from a config.json, such as that of another run."""
    settings: Annotated[RunConfig, tyro.conf.OmitArgPrefixes] = PRESETS["default"]


def parse_run(argv: list[str] | None = None) -> RunArguments:
    """The arguments of experiments/run.py: flags, over the configuration they start from.

    That is --preset or --config where given, else, with --resume, the run's own, else the default.
    Prints the help and exits with 0 for --help; raises UsageError for a mistake.
    """
    given = parse(RunArguments, argv)
    if given.preset is not None and given.config is not None:
        raise UsageError("--preset and --config: give one of them")
    if given.resume and given.run_dir is None:
        raise UsageError("--resume: needs --run-dir, the run to go on with")
    saved = Path(given.run_dir or "") / "config.json"
    if given.preset is not None:
        start = choose(PRESETS, given.preset, "--preset")
    elif given.config is not None:
        start = configs.read(Path(given.config))
    elif given.resume and saved.exists():
        start = configs.read(saved)
    else:
        return given
    return parse(RunArguments, argv, RunArguments(settings=start))


def parse(arguments_class: type[Arguments], argv: list[str] | None = None, default: Any = None) -> Arguments:
    """The command line as a dataclass; prints help and exits with 0 for --help; raises UsageError for a mistake."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments_class, args=argv, **({} if default is None else {"default": default}))
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UsageError(_in_one_line(said.getvalue())) from None


def load_tensorflow() -> None:
    """Imports TensorFlow and lets it look for devices, without the dozen lines that it prints meanwhile.

    It writes them past every setting of its own, straight to the file descriptor of stderr; they are shown where
    the user has set TF_CPP_MIN_LOG_LEVEL to 0, and where the import fails.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        return
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_logical_devices()
        except BaseException:
            hidden.seek(0)
            os.write(shown, hidden.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _in_one_line(box: str) -> str:
    """tyro's error, a box of several lines with rules between its parts, as one line."""
    inside = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:-1]]
    first, *others = (part.split("\n") for part in re.split(r"\n─+\n", "\n".join(inside)))
    line = " ".join(first)
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
    except RunError as error:
        status = _say(error, 1)
    except Stopped as stop:
        status = _say(stop, 128 + stop.signal_number)
    except KeyboardInterrupt:
        status = _say("interrupted", 130)
    sys.exit(status)


def _say(message: object, status: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
