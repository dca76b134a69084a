"""Export a model for other runtimes: `python experiments/export.py runs/NAME --format onnx --output denoise.onnx`."""

from dae import cli
from dae.commands import export

if __name__ == "__main__":
    cli.run(export.main)
