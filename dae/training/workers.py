"""Checks that several workers train the same run: the same settings, images and states."""

import dataclasses
import hashlib
import json

import numpy as np

from dae import plugins
from dae.config import PATH_FIELDS, RunConfig, to_json
from dae.errors import RunError, UsageError, warn
from dae.replicas import Replicas
from dae.resolved import Resolved
from dae.training.train_state import TrainState
from dae.workdir.workdir import environment


def check_settings(config: RunConfig, resolved: Resolved, replicas: Replicas) -> None:
    """Raise UsageError if a worker has other settings or images than the chief.

    Warns of other versions, processors and GPUs. Paths may differ.
    """
    if replicas.workers == 1:
        return
    settings = json.loads(to_json(config, lambda name, text: plugins.without_paths(text)))
    settings |= dataclasses.asdict(resolved) | dict.fromkeys(PATH_FIELDS)
    own = {"settings": settings, "machine": environment()}
    chief, *others = map(json.loads, replicas.exchange(json.dumps(own).encode()))
    for number, worker in enumerate(others, start=1):
        for name, value in chief["settings"].items():
            if (got := worker["settings"][name]) != value:
                raise UsageError(f"worker {number} has another configuration than worker 0: {name} {got}, not {value}")
        ours, theirs = chief["machine"], worker["machine"]
        for name in ("versions", "cpu", "gpus"):
            if ours[name] != theirs[name]:
                warn(f"worker {number}: {name} {theirs[name]}, of worker 0 {ours[name]}; the last bits may differ")


def check_states(state: TrainState, replicas: Replicas) -> None:
    """Raise RunError if the weights, the optimizer or the loss of a worker differ from those of the chief."""
    if replicas.workers == 1:
        return
    digest = hashlib.sha256()
    of_losses = (weight for layer in state.loss for weight in layer.variables)
    # Not model.variables: the states of Dropout's random numbers are those of the last shard of each worker.
    for variable in (*state.model.weights, *state.optimizer.variables, *of_losses):
        digest.update(np.asarray(variable).tobytes())
    chief, *others = replicas.exchange(digest.digest())
    for number, worker in enumerate(others, start=1):
        if worker != chief:
            raise RunError(
                f"the weights of worker {number} differ from those of worker 0 after step {int(state.step)}; the loss, "
                "the noise or the network is not a function of its inputs alone"
            )
