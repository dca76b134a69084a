"""What several workers do to train the same run: they compare settings and states, and only the chief prints."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

import numpy as np

from dae.config import RunConfig, differences, from_json, to_json
from dae.errors import RunError, UsageError
from dae.replicas import Replicas
from dae.reporting.console import warn
from dae.training.train_state import TrainState
from dae.workdir.environment import environment


def compare_workers(config: RunConfig, replicas: Replicas) -> None:
    """Raise UsageError if a worker has another configuration than the chief, or a GPU while the chief has none.

    Warns of other versions, processors and GPUs.
    """
    if replicas.workers == 1:
        return
    described = environment()
    own = {"config": to_json(config), **{name: described[name] for name in ("versions", "cpu", "gpus")}}
    chief, *others = [json.loads(text) for text in replicas.exchange(json.dumps(own).encode())]
    for worker, other in enumerate(others, start=1):
        expected, got = (from_json(each["config"], f"worker {worker}") for each in (chief, other))
        if differing := differences(expected, got, ("data", "start_from")):
            raise UsageError(f"worker {worker} has another configuration than worker 0 ({differing})")
        if bool(chief["gpus"]) != bool(other["gpus"]):
            raise UsageError(f"worker {worker} has the GPUs {other['gpus']}, worker 0 {chief['gpus']}; see --devices")
        for name in ("versions", "cpu", "gpus"):
            if chief[name] != other[name]:
                warn(f"worker {worker}: {name} {other[name]}, of worker 0 {chief[name]}; the last bits may differ")


def check_states(state: TrainState, replicas: Replicas) -> None:
    """Raise RunError if the weights, the optimizer or the loss of a worker differ from those of the chief."""
    if replicas.workers == 1:
        return
    digest = hashlib.sha256()
    of_losses = (variable for layer in state.loss for variable in layer.variables)
    for variable in (*state.model.variables, *state.optimizer.variables, *of_losses):
        digest.update(np.asarray(variable).tobytes())
    chief, *others = replicas.exchange(digest.digest())
    for worker, other in enumerate(others, start=1):
        if other != chief:
            raise RunError(
                f"the weights of worker {worker} differ from those of worker 0 after step {int(state.step)}; the loss, "
                "the noise or the network is not a function of its inputs alone"
            )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Drop what is printed on stderr, such as warnings, which the chief prints too. An exception is not caught."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        yield
