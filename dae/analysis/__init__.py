"""What is learned from finished runs: noise sweeps, comparisons and reproducibility."""
