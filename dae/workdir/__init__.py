"""A run's folder: lock, configuration, metrics, report, environment and model files."""
