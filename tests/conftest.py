"""Gives the fixtures to every process that runs tests; with xdist, the one that divides the tests starts without them."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("fixtures")  # which imports TensorFlow, for five seconds
