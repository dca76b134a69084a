"""Denoise your own images: `python experiments/denoise.py photos --output denoised`."""

from dae import cli
from dae.commands import denoise

if __name__ == "__main__":
    cli.run(denoise.main)
