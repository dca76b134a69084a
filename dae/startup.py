"""The import of TensorFlow and Keras: without their messages, and with a backend and settings that `dae` can use."""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from dae.errors import UsageError, first_line, muted_stderr


def check_backend() -> None:
    """Raise UsageError if Keras has been imported with a backend other than TensorFlow."""
    keras = sys.modules.get("keras")
    if keras is not None and (backend := keras.config.backend()) != "tensorflow":
        allowed = "import dae first, or set KERAS_BACKEND=tensorflow"
        raise UsageError(f"keras: was imported with the backend {backend}, but dae needs tensorflow; {allowed}")


def import_tensorflow() -> None:
    """Import TensorFlow and hide the messages that it prints while it loads, unless TF_CPP_MIN_LOG_LEVEL is 0.

    TensorFlow writes them directly to the file descriptor of stderr, whatever that variable is. Raises UsageError if
    Keras rejects its keras.json.
    """
    is_shown = os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0" or "tensorflow" in sys.modules or sys.stderr is None
    with contextlib.nullcontext() if is_shown else muted_stderr():
        try:
            import keras  # noqa: F401
            import tensorflow as tf
        except (AssertionError, AttributeError, TypeError, ValueError) as error:  # whose messages do not name the file
            if "keras" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
                raise
            raise UsageError(f"keras.json in KERAS_HOME or ~/.keras: cannot be used ({first_line(error)})") from None
        tf.config.list_physical_devices()  # looks for GPUs, and complains if there are none
