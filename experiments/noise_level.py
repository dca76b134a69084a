"""Estimate the noise in your images: `python experiments/noise_level.py photos`."""

from dae import cli
from dae.commands import noise

if __name__ == "__main__":
    cli.run(noise.main)
