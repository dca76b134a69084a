"""Analysis of finished runs: noise sweeps, comparisons, score tables and reproducibility."""
