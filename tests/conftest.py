"""Load the fixtures, except in the process of xdist that only divides the tests."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")  # which imports TensorFlow, for five seconds
