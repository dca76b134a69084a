"""Analysis of finished runs: noise sweeps, comparisons and reproducibility."""
