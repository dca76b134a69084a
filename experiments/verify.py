"""Prove that a finished run can be reproduced, bit for bit: `python experiments/verify.py runs/NAME`."""

from dae import cli
from dae.commands import verify

if __name__ == "__main__":
    cli.run(verify.main)
