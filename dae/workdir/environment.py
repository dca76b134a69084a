"""What a result depends on besides its configuration: versions, source, command line and machine."""

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf

from dae.runtime import cores, cpu_name


def environment() -> dict[str, Any]:
    """Describe this process, for a run's environment.json."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dae", "tensorflow", "keras", "numpy")},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": _git("status", "--porcelain", "--untracked-files=no", parse=str.splitlines),
        "command": [sys.executable, *sys.argv],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": cores(),
        "gpus": [
            tf.config.experimental.get_device_details(device).get("device_name", device.name)
            for device in tf.config.get_visible_devices("GPU")
        ],
    }


def _git(*arguments: str, parse: Callable[[str], Any] = str.strip) -> Any:
    """Ask git about the checkout that holds the running script; None without git or without a checkout."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        completed = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(completed.stdout) if completed.returncode == 0 else None
