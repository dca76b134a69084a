"""What computes a run: the devices of this process, and the other workers if there are several.

Each batch is divided into a recorded number of shards, which are divided among the workers, and those of a worker among
its devices. What the shards give is added in an order that does not depend on this division. So neither do the bits of
a result.

The workers are processes, on one machine or on several, that the variable TF_CONFIG lists. They communicate through
TensorFlow's MultiWorkerMirroredStrategy. Its scope is not used: every worker takes the same steps with the same sums,
so that plain variables stay equal.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dae.errors import RunError, UsageError, first_line, listed

# What TensorFlow raises if another worker has stopped.
LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)
# How long, in seconds, a worker waits for the others to start.
JOIN_TIMEOUT = 600


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The devices and workers that train one run together. Worker 0 is the chief: it alone writes, prints and logs."""

    devices: tuple[str, ...] = ()
    """Names of TensorFlow's devices, such as GPU:1; with none, TensorFlow chooses."""
    worker: int = 0
    """The number of this worker."""
    addresses: tuple[str, ...] = ()
    """Where the workers listen, HOST:PORT each, in order; empty if there is only this process."""

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return max(1, len(self.addresses))

    @property
    def is_chief(self) -> bool:
        """Whether this worker is the one that writes, prints and logs."""
        return self.worker == 0

    def check(self, shards: int) -> None:
        """Raise UsageError unless the workers can divide this many shards, and yet add them in the same order."""
        if not _divides(self.workers, shards):
            allowed = [workers for workers in range(1, shards + 1) if _divides(workers, shards)]
            raise UsageError(
                f"--shards: {shards} cannot be divided among {self.workers} workers; expected {self.workers} times a "
                f"power of two; {shards} can be divided among {', '.join(map(str, allowed))}"
            )

    def shards(self, total: int) -> range:
        """Return the numbers of this worker's shards, out of `total`."""
        each = total // self.workers
        return range(self.worker * each, (self.worker + 1) * each)

    def on_device(self, part: int, parts: int) -> contextlib.AbstractContextManager:
        """Return a context that places operations for part number `part`, of `parts` in this process, on a device."""
        if len(self.devices) < 2:
            return contextlib.nullcontext()
        return tf.device(self.devices[part * len(self.devices) // parts])

    def sum(self, shards: Sequence[Sequence[tf.Tensor]], exact: bool = True) -> list[tf.Tensor]:
        """Return the sum of each of several float32 tensors over the shards of all workers; for a graph.

        `shards` has these tensors for each shard of this worker. Neighbours are added first, and then neighbouring
        sums, so that the order is the same for any number of workers that `check` allows. Without `exact`, the order in
        which the sums of more than two workers are added is TensorFlow's.
        """
        sums = [_pairwise_sum(list(tensors)) for tensors in zip(*shards, strict=True)]
        if self.workers == 1:
            return sums
        shapes, sizes = [one.shape for one in sums], [one.shape.num_elements() for one in sums]
        vector = tf.concat([tf.reshape(one, [-1]) for one in sums], axis=0)
        if exact:
            rows = tf.ensure_shape(self.gather(vector[tf.newaxis]), [self.workers, sum(sizes)])
            vector = _pairwise_sum(tf.unstack(rows))
        else:
            vector = tf.ensure_shape(self._run(lambda own: _context().all_reduce("SUM", own), vector), vector.shape)
        return [tf.reshape(part, shape) for part, shape in zip(tf.split(vector, sizes), shapes, strict=True)]

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the tensors of all workers, joined along axis 0 in their order; for a graph."""
        return tensor if self.workers == 1 else self._run(lambda part: _context().all_gather(part, axis=0), tensor)

    def exchange(self, content: bytes) -> list[bytes]:
        """Return the `content` of all workers, in their order."""
        if self.workers == 1:
            return [content]
        padded = len(content).to_bytes(8, "little") + content + bytes(-len(content) % 4)
        together = _exchange_graph(self)(np.frombuffer(padded, np.int32)).numpy().tobytes()
        contents = []
        while together:
            size = int.from_bytes(together[:8], "little")
            contents.append(together[8 : 8 + size])
            together = together[8 + size + -size % 4 :]
        return contents

    def maximum(self, number: int) -> int:
        """Return the highest of the numbers, at least 0, of all workers."""
        return max(int.from_bytes(each, "little") for each in self.exchange(number.to_bytes(8, "little")))

    def _run(self, function: Any, tensor: tf.Tensor) -> tf.Tensor:
        # The identity lies on the worker's own device, where the strategy looks for the tensor.
        return _strategy(self.worker, self.addresses).run(lambda part: function(tf.identity(part)), args=(tensor,))

    def connect(self) -> None:
        """Wait until all workers have started. Starts TensorFlow, whose settings must be final.

        Raises RunError if that takes longer than JOIN_TIMEOUT.
        """
        if self.workers > 1:
            _strategy(self.worker, self.addresses)


# This process, without others.
ALONE = Replicas()


def _divides(workers: int, shards: int) -> bool:
    each, remainder = divmod(shards, workers)
    return remainder == 0 and (workers == 1 or (each > 0 and each & (each - 1) == 0))


def _pairwise_sum(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Return the sum: of neighbours first, then of neighbouring sums, and so on."""
    while len(tensors) > 1:
        pairs = [a + b for a, b in zip(tensors[::2], tensors[1::2], strict=False)]
        tensors = pairs + tensors[2 * len(pairs) :]
    return tensors[0]


def _context() -> tf.distribute.ReplicaContext:
    return tf.distribute.get_replica_context()


@functools.cache
def _exchange_graph(replicas: Replicas) -> Any:
    # All workers must trace the same collective operations in the same order, so one graph is for any length.
    return tf.function(replicas.gather, input_signature=[tf.TensorSpec([None], tf.int32)])


def from_environment(devices: Sequence[str] = ()) -> Replicas:
    """Return the replicas that TF_CONFIG describes, or else this process alone.

    Raises UsageError if TF_CONFIG is not as TensorFlow defines it, or names tasks that do not train.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        settings = json.loads(text or "{}")
        cluster, task = dict(settings.get("cluster", {})), dict(settings.get("task", {}))
        tasks = [(kind, number) for kind in ("chief", "worker") for number in range(len(cluster.get(kind, [])))]
        addresses = tuple(cluster[kind][number] for kind, number in tasks)
        if not all(address.rpartition(":")[0] and address.rpartition(":")[2].isdigit() for address in addresses):
            raise ValueError(addresses)
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UsageError(
            f'TF_CONFIG: expected {{"cluster": {{"worker": ["HOST:PORT", ...]}}, "task": {{"type": "worker", "index": '
            f"0}}}}, got {text[:200]!r}"
        ) from None
    if unknown := set(cluster) - {"chief", "worker"}:
        raise UsageError(f"TF_CONFIG: a cluster with tasks {sorted(unknown)}; expected only 'chief' and 'worker'")
    if not tasks:
        return Replicas(tuple(devices))
    with contextlib.suppress(KeyError, ValueError, TypeError):
        task["index"] = int(task["index"])  # TensorFlow takes "0" too
    own = (task.get("type"), task.get("index"))
    if own not in tasks:
        raise UsageError(f"TF_CONFIG: the cluster has no task {own[0]} {own[1]}; it has {listed(tasks)}")
    return Replicas(tuple(devices), tasks.index(own), addresses if len(addresses) > 1 else ())


def local_tf_configs(workers: int) -> list[str]:
    """Return a value of TF_CONFIG for each of so many workers on this machine, with ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(workers)]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    cluster = {"worker": addresses}
    return [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": n}}) for n in range(workers)]


@functools.cache
def _strategy(worker: int, addresses: tuple[str, ...]) -> tf.distribute.Strategy:
    """Connect the workers, once per process."""
    _wait_for_others(worker, addresses)
    resolved = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    # With one replica per worker, whose devices divide its shards.
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        resolved.cluster_spec(),
        task_type=resolved.task_type,
        task_id=int(resolved.task_id),
        num_accelerators={},
        rpc_layer="grpc",
    )
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    except (RuntimeError, tf.errors.OpError) as error:
        raise RunError(
            f"cannot connect the workers ({first_line(error)}); train before any other use of TensorFlow"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # TensorFlow has replaced the handler by one that only takes note of the signal.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def _wait_for_others(worker: int, addresses: tuple[str, ...]) -> None:
    """Wait until all other workers listen; TensorFlow would wait for an hour, and could not be interrupted."""
    host, port = addresses[worker].rsplit(":", 1)
    absent = {*addresses} - {addresses[worker]}
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    end = time.monotonic() + JOIN_TIMEOUT
    try:
        listening = socket.create_server(("", int(port)), **both)  # type: ignore[arg-type]
    except OSError as error:
        raise UsageError(f"TF_CONFIG: cannot listen at {host}:{port} ({error.strerror})") from None
    with listening:
        while absent:
            absent = {address for address in absent if not _listens(address)}
            if absent and time.monotonic() > end:
                raise RunError(
                    f"worker {worker} has waited {JOIN_TIMEOUT} s for {listed(sorted(absent))}; start the "
                    "same command on each machine"
                )
            time.sleep(0.1 if absent else 0)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return True
    return False
