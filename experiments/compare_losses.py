"""Compare losses over several seeds: `python experiments/compare_losses.py --losses bce mse`."""

from dae import cli
from dae.commands import compare

if __name__ == "__main__":
    cli.run(compare.main)
