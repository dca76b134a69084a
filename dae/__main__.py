"""The command `dae`, or `python -m dae`, which calls the modules of dae/commands/."""

import importlib
import sys

from dae import __version__, cli
from dae.errors import lookup

COMMANDS = {
    "train": "train a denoising autoencoder",
    "denoise": "denoise pictures and arrays",
    "evaluate": "evaluate trained models on test images",
    "compare": "compare losses, or values of another setting, over several seeds",
    "noise": "estimate the level of the noise in pictures and arrays",
    "export": "export a model for other runtimes: ONNX, LiteRT or SavedModel",
    "verify": "prove that a finished run can be reproduced, bit for bit",
}


def call() -> None:
    """Call the command that the command line names, or print the help or the version.

    Raises UsageError if there is no such command. The other commands are not imported, which would take longer.
    """
    sys.argv[0] = "dae"
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: dae COMMAND [FLAGS]; `dae COMMAND --help` lists the flags of a command\n")
        print(*(f"  {command:<10}{what}" for command, what in COMMANDS.items()), sep="\n")
    elif name == "--version":
        print(f"dae {__version__}")
    else:
        lookup(COMMANDS, name, "COMMAND")
        sys.argv[:2] = [f"dae {name}"]  # the name of the program in its messages
        importlib.import_module(f"dae.commands.{name}").main()


def main() -> None:
    """Run the command line, and exit as `cli.run` does."""
    cli.run(call)


if __name__ == "__main__":
    main()
