"""Metrics, and the evaluation of a model on a set of images."""
