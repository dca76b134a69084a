"""Train a denoising autoencoder: `python experiments/run.py`, or `dae train`; `--help` lists the flags.

What it does is in dae/commands/train.py, which parses the flags and calls `dae.train`; then come dae/training/task.py,
which describes the run, and dae/training/trainer.py, the loop.
"""

from dae import cli
from dae.commands import train

if __name__ == "__main__":
    cli.run(train.main)
