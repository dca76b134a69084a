"""Evaluation of a model: the exact means of all metrics over a set of images."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from dae.data.images import Images
from dae.data.pipeline import Batch
from dae.errors import UsageError, as_usage_error
from dae.evaluation.metrics import METRICS
from dae.losses.composite import ImageFunction
from dae.losses.objective import Objective
from dae.models.fused_layers import fused
from dae.models.sizes import fitting_size
from dae.replicas import ALONE, Replicas, split

T = TypeVar("T")

# A function from a prefix and batches to the means of the metrics, named with the prefix: `validation_psnr`.
Evaluate = Callable[[str, Iterable[Batch]], dict[str, float]]


def make_evaluator(
    model: keras.Model,
    objective: Objective | None = None,
    metrics: Mapping[str, ImageFunction] = METRICS,
    replicas: Replicas = ALONE,
) -> Evaluate:
    """Return the function from a prefix and batches to the means of the loss's values and all `metrics` over images.

    The loss is computed from the network's outputs, and metrics from these outputs clipped to [0, 1]. Every image has
    the same weight; sums are float64. The function is compiled for each size of images, so make it
    once. Each batch is computed in the shards of `replicas`. Images of a size that `model` does not take are mirrored
    at the edges up to one that it takes. With several workers, each calls it with some of the batches.
    """
    names = [*(objective.loss.names if objective else ()), *metrics]

    @compiled_by_shape
    def batch_sums(batch: Batch) -> dict[str, tf.Tensor]:
        network = fused(model, training=False)
        shard_sums: dict[str, list[tf.Tensor]] = {name: [] for name in names}
        shards = min(replicas.shards, batch.clean.shape[0])
        for shard in split(batch, shards):
            with replicas.on_device(shard.number, shards):
                images = shard.batch
                outputs = network(images.noisy)
                inputs = objective.inputs(network, images, outputs) if objective else {}
                values = objective.loss(images.clean, outputs.denoised, inputs) if objective else {}
                values |= {name: metric(images.clean, outputs.images, inputs) for name, metric in metrics.items()}
                for name, value in values.items():
                    shard_sums[name].append(tf.reduce_sum(tf.cast(value, tf.float64)))
        return {name: tf.add_n(sums) for name, sums in shard_sums.items()}

    def evaluate(prefix: str, batches: Iterable[Batch]) -> dict[str, float]:
        rows = [[batch.clean.shape[0], *batch_sums(batch).values()] for batch in batches]
        of_all_workers = b"".join(replicas.exchange(np.array(rows, np.float64).tobytes()))
        sums = np.frombuffer(of_all_workers).reshape(-1, 1 + len(names))
        # A sum that is rounded only once does not depend on the order, and so not on the number of workers.
        images, *totals = (math.fsum(column) if np.isfinite(column).all() else sum(column) for column in sums.T)
        return {f"{prefix}_{name}": total / images for name, total in zip(names, totals, strict=True) if images}

    return evaluate


def compiled_by_shape(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Return `function`, of a batch or a tensor, with a graph for each shape; the last 32 graphs are kept.

    A tf.function alone would keep all, which take megabytes each, and warn the user if there are many.
    """

    @functools.lru_cache(maxsize=32)
    def compiled(specs: Any) -> Callable[[Any], T]:
        return tf.function(function).get_concrete_function(specs)

    return lambda batch: compiled(tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), batch))(batch)


def check_fits(model: keras.Model, images: Images) -> None:
    """Raise UsageError unless `model` takes images like `images`, if need be after they are padded."""
    if model.input_shape[-1] not in (None, images.channels):
        raise UsageError(
            f"--data: the model takes images of {model.input_shape[-1]} channels, not of {images.channels}"
            + ("; --grey converts them" if model.input_shape[-1] == 1 else "")
        )
    with as_usage_error("--data"):
        for height, width in np.unique(images.shapes, axis=0):
            fitting_size(model, int(height), int(width))
