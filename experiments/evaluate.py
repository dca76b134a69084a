"""Evaluate trained models on test images: `python experiments/evaluate.py runs/NAME`."""

from dae import cli
from dae.commands import evaluate

if __name__ == "__main__":
    cli.run(evaluate.main)
