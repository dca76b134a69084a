"""A run's folder: lock, atomic files, environment and model files."""
