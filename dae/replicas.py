"""Data parallelism: shards of a batch on the devices of this process, and on the other workers if there are several.

Each batch is divided into a recorded number of shards, which are divided among the workers, and those of a worker among
its devices. The means over the shards are added in an order that does not depend on this division, and so the bits of
a result do not depend on it either.

The workers are processes, on one machine or on several, that the variable TF_CONFIG lists. They communicate through
TensorFlow's MultiWorkerMirroredStrategy. Its scope is not used: every worker takes the same steps with the same means,
so that plain variables stay equal.
"""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from dae.data.pipeline import Batch
from dae.errors import RunError, UsageError, as_usage_error, first_line

T = TypeVar("T")

# What TensorFlow raises if another worker has stopped.
LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)
# Seconds for which a worker waits for the others to start.
JOIN_TIMEOUT = 600


class Shard(NamedTuple):
    """One of the parts into which a batch is divided."""

    batch: Batch
    """Its images and its seed. A shard without images is represented by the first image of the batch."""
    fraction: float
    """The fraction of the batch's images that are in the shard; 0 if there are fewer images than shards."""
    number: int


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The devices and workers that train one run together. Worker 0 is the chief, whose files and output are kept."""

    devices: tuple[str, ...] = ()
    """Names of TensorFlow's devices, such as GPU:1; with none, TensorFlow chooses."""
    worker: int = 0
    """The number of this worker, its rank."""
    addresses: tuple[str, ...] = ()
    """HOST:PORT at which each worker listens, in order; empty if there is only this process."""
    shards: int = 1
    """Shards of each batch, of all workers."""

    @property
    def workers(self) -> int:
        """The number of workers, the world size."""
        return max(1, len(self.addresses))

    @property
    def is_chief(self) -> bool:
        """True if this worker is the chief."""
        return self.worker == 0

    @property
    def own_shards(self) -> range:
        """The numbers of the shards that this worker computes."""
        per_worker = self.shards // self.workers
        return range(self.worker * per_worker, (self.worker + 1) * per_worker)

    def with_shards(self, shards: int) -> "Replicas":
        """Return these replicas with another number of shards.

        Raises UsageError unless the workers can divide the shards and yet add them in the same order.
        """
        if not _divides(self.workers, shards):
            allowed = [workers for workers in range(1, shards + 1) if _divides(workers, shards)]
            raise UsageError(
                f"--shards: {shards} cannot be divided among {self.workers} workers; expected {self.workers} times a "
                f"power of two; {shards} can be divided among {', '.join(map(str, allowed))}"
            )
        return dataclasses.replace(self, shards=shards)

    def mean(
        self, function: Callable[[Batch], T], batch: Batch, variables: Sequence[tf.Variable] = ()
    ) -> tuple[T, list[tf.Tensor]]:
        """Return the mean of a function over the images of `batch`, and the means of variables that it changes.

        For a graph, with a batch of static shape. The shards are computed in parallel, on the devices of this worker,
        and the means are those over the shards of all workers. Neighbouring shards are added first, and then
        neighbouring sums, so that the order is the same for any number of workers.

        Args:
            function: Returns float32 tensors in any structure, each a mean over the images of the batch it is given.
            batch: The whole batch, equal on all workers.
            variables: Float32 variables that the function changes, such as moving averages. For each shard they start
                from their present values. Assigning the means to them is left to the caller.
        """
        before, sums = [tf.identity(variable) for variable in variables], []
        for shard in split(batch, self.shards, self.own_shards):
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
            index = shard.number - self.own_shards.start
            with tf.name_scope(f"shard_{shard.number}"), self.on_device(index, len(self.own_shards)):
                result = function(shard.batch)
                # Changes instead of values, so that what does not change, such as frozen weights, keeps its bits.
                changes = [variable - value for variable, value in zip(variables, before, strict=True)]
                # tf.gather has a sparse gradient.
                tensors = [tf.convert_to_tensor(tensor) for tensor in (*tf.nest.flatten(result), *changes)]
                sums.append([shard.fraction * tensor for tensor in tensors])
        with tf.name_scope("sum_of_shards"):
            means = self._sum_over_workers([_pairwise_sum(list(tensors)) for tensors in zip(*sums, strict=True)])
        count = len(means) - len(variables)
        after = [value + change for value, change in zip(before, means[count:], strict=True)]
        return tf.nest.pack_sequence_as(result, means[:count]), after

    def on_device(self, index: int, count: int) -> contextlib.AbstractContextManager:
        """Return a context that places the operations of number `index` of `count` equal tasks here on a device."""
        if len(self.devices) < 2:
            return contextlib.nullcontext()
        return tf.device(self.devices[index * len(self.devices) // count])

    @tf.autograph.experimental.do_not_convert
    def _sum_over_workers(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        if self.workers == 1:
            return tensors
        shapes, sizes = [tensor.shape for tensor in tensors], [tensor.shape.num_elements() for tensor in tensors]
        vector = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        rows = tf.ensure_shape(self.gather(vector[tf.newaxis]), [self.workers, sum(sizes)])
        total = tf.split(_pairwise_sum(tf.unstack(rows)), sizes)
        return [tf.reshape(values, shape) for values, shape in zip(total, shapes, strict=True)]

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the tensors of all workers, joined along axis 0 in their order; for a graph."""

        def gather(own: tf.Tensor) -> tf.Tensor:
            # The identity lies on the worker's own device, where the strategy looks for the tensor.
            return tf.distribute.get_replica_context().all_gather(tf.identity(own), axis=0)

        return _strategy(self.worker, self.addresses).run(gather, args=(tensor,))

    def exchange(self, content: bytes) -> list[bytes]:
        """Return the `content` of all workers, in their order; each must call this at the same point."""
        if self.workers == 1:
            return [content]
        gather = _exchange_graph(self)
        sizes = gather(np.array([len(content)], np.int32)).numpy()
        # TensorFlow crashes if there is nothing to gather.
        padded = np.frombuffer(content.ljust(max(*sizes, 1), b"\0"), np.uint8).astype(np.int32)
        rows = gather(padded).numpy().astype(np.uint8).reshape(self.workers, -1)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def connect(self) -> None:
        """Wait until all workers have started. Starts TensorFlow, whose settings must be final.

        Raises RunError if that takes longer than JOIN_TIMEOUT.
        """
        if self.workers > 1:
            _strategy(self.worker, self.addresses)


# This process without other workers, for whole batches.
ALONE = Replicas()


@tf.autograph.experimental.do_not_convert
def split(batch: Batch, shards: int, numbers: range | None = None) -> list[Shard]:
    """Return the shards of a batch with these `numbers`, by default all, of nearly equal sizes.

    The seed of a shard is a function of the batch's seed and its number. A graph that treats each shard separately
    runs them in parallel, one per core. On two cores a step of `conv` takes 0.73 of the time (median of three pairs)
    that it takes unsplit with two threads in each operation.
    """
    images, result = batch.clean.shape[0], []
    for number in range(shards) if numbers is None else numbers:
        start, end = images * number // shards, images * (number + 1) // shards
        content = batch.images(start, end) if end > start else batch.images(0, 1)
        seed = tf.random.experimental.stateless_fold_in(batch.seed, number)
        result.append(Shard(content._replace(seed=seed), (end - start) / images, number))
    return result


def _divides(workers: int, shards: int) -> bool:
    per_worker, remainder = divmod(shards, workers)
    return remainder == 0 and (workers == 1 or (per_worker > 0 and per_worker & (per_worker - 1) == 0))


def _pairwise_sum(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Return the sum: of neighbours first, then of neighbouring sums, and so on."""
    while len(tensors) > 1:
        pairs = [a + b for a, b in zip(tensors[::2], tensors[1::2], strict=False)]
        tensors = pairs + tensors[2 * len(pairs) :]
    return tensors[0]


@functools.cache
def _exchange_graph(replicas: Replicas) -> Any:
    # All workers must trace the same collective operations in the same order, so one graph is for any length.
    return tf.function(replicas.gather, input_signature=[tf.TensorSpec([None], tf.int32)])


def from_environment(devices: Sequence[str] = ()) -> Replicas:
    """Return the replicas that TF_CONFIG describes, or else this process alone.

    Raises UsageError if TF_CONFIG is not as TensorFlow defines it, or names other tasks than chief and worker.
    """
    if not os.environ.get("TF_CONFIG"):
        return Replicas(tuple(devices))
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        cluster = resolver.cluster_spec().as_dict()
        tasks = [(kind, number) for kind in ("chief", "worker") for number in range(len(cluster.get(kind, [])))]
        addresses = tuple(cluster[kind][number] for kind, number in tasks)
        if set(cluster) - {"chief", "worker"} or not all(re.fullmatch(r".+:\d+", address) for address in addresses):
            raise ValueError(cluster)
        worker = tasks.index((resolver.task_type, int(resolver.task_id))) if tasks else 0
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UsageError(
            'TF_CONFIG: expected {"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}, '
            f"with tasks of the types chief and worker only, got {os.environ['TF_CONFIG'][:200]!r}"
        ) from None
    return Replicas(tuple(devices), worker, addresses if len(addresses) > 1 else ())


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
    dual_stack = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    end = time.monotonic() + JOIN_TIMEOUT
    with as_usage_error(f"TF_CONFIG: {addresses[worker]}", "cannot listen there", OSError):
        listening = socket.create_server(("", _host_and_port(addresses[worker])[1]), **dual_stack)  # type: ignore[arg-type]
    with listening:
        for address in (*addresses[:worker], *addresses[worker + 1 :]):
            while True:
                with contextlib.suppress(OSError), socket.create_connection(_host_and_port(address), timeout=5):
                    break
                if time.monotonic() > end:
                    raise RunError(f"worker {worker} has waited {JOIN_TIMEOUT} s for {address}; start all workers")
                time.sleep(0.1)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
