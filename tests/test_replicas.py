import json
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from helpers import batch_of, random_values
from hypothesis import given
from hypothesis import strategies as st

from dae import replicas, runtime
from dae.config import RunConfig
from dae.data.pipeline import Batch
from dae.errors import UsageError
from dae.replicas import ALONE, Replicas, from_environment, split

ADDRESSES = ("first:1", "second:2", "third:3", "fourth:4", "fifth:5", "sixth:6")


def tf_config(task: object, **cluster: object) -> str:
    return json.dumps({"cluster": cluster, "task": task})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ALONE),
        ("", ALONE),
        ("{}", ALONE),
        (tf_config({"type": "worker", "index": 0}, worker=["a:1"]), ALONE),
        (tf_config({"type": "worker", "index": 1}, worker=["a:1", "b:2"]), Replicas((), 1, ("a:1", "b:2"))),
        (tf_config({"type": "worker", "index": "1"}, worker=["a:1", "b:2"]), Replicas((), 1, ("a:1", "b:2"))),
        (tf_config({"type": "chief", "index": 0}, worker=["b:2"], chief=["a:1"]), Replicas((), 0, ("a:1", "b:2"))),
        (tf_config({"type": "worker", "index": 0}, worker=["b:2"], chief=["a:1"]), Replicas((), 1, ("a:1", "b:2"))),
    ],
)
def test_workers_are_those_of_tf_config(text, expected, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    assert from_environment() == expected
    assert from_environment(("GPU:0",)) == replace(expected, devices=("GPU:0",))
    assert from_environment().is_chief == (expected.worker == 0)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        tf_config({"type": "worker", "index": 0}, worker=[1, 2]),
        tf_config({"type": "worker", "index": 0}, worker=["nowhere", "a:1"]),
        tf_config({"type": "worker", "index": 0}, worker="a:1"),
        tf_config([], worker=["a:1", "b:2"]),
        tf_config({"type": "worker", "index": 2}, worker=["a:1", "b:2"]),
        tf_config({"type": "ps", "index": 0}, worker=["a:1"], ps=["b:2"]),
    ],
)
def test_another_tf_config_is_rejected(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match=r"^TF_CONFIG: expected {.*HOST:PORT.*types chief and worker only, got '"):
        from_environment()


def group(workers: int) -> list[Replicas]:
    return [Replicas((), worker, ADDRESSES[:workers] if workers > 1 else ()) for worker in range(workers)]


@given(st.integers(1, 6), st.integers(1, 64))
def test_each_shard_has_one_worker(workers, shards):
    try:
        with_shards = [replicas.with_shards(shards) for replicas in group(workers)]
    except UsageError as error:
        assert f"{shards} cannot be divided among {workers} workers" in str(error)
        assert workers > 1
        assert shards % workers or bin(shards // workers).count("1") > 1
    else:
        assert [shard for replicas in with_shards for shard in replicas.own_shards] == list(range(shards))


@given(st.integers(1, 6), st.sampled_from([1, 2, 4, 8]), st.integers(0, 100))
def test_sums_have_the_same_bits_for_any_number_of_workers(workers, per_worker, seed):
    """The sums of each worker's shards are added as `Replicas.mean` does after it has gathered them."""
    rows = random_values(seed, workers * per_worker, 3)
    whole = replicas._pairwise_sum(list(rows))
    sums = [replicas._pairwise_sum(list(own)) for own in rows.reshape(workers, per_worker, 3)]
    assert replicas._pairwise_sum(sums).tobytes() == whole.tobytes()
    assert whole == pytest.approx(rows.sum(axis=0), abs=1e-4)


def batch_with(images: int) -> Batch:
    return batch_of(random_values(1, images, 2, 2, 1), random_values(2, images, 2, 2, 1))


@pytest.mark.parametrize(
    ("images", "shards", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [3, 4]), (3, 4, [0, 1, 1, 1]), (5, 1, [5]), (10, 4, [2, 3, 2, 3])],
)
def test_split_makes_nearly_equal_shards_in_order(images, shards, sizes):
    """A shard without images is the first image of the batch, with the weight 0."""
    batch = batch_with(images)
    result = split(batch, shards)
    assert [shard.number for shard in result] == list(range(shards))
    assert [round(shard.fraction * images) for shard in result] == sizes
    assert [len(shard.batch.clean) for shard in result] == [max(1, size) for size in sizes]
    for name in ("noisy", "clean", "noise_level"):
        parts = [getattr(shard.batch, name)[:size] for shard, size in zip(result, sizes, strict=True)]
        np.testing.assert_array_equal(tf.concat(parts, axis=0), getattr(batch, name))
    seeds = {tuple(shard.batch.seed.numpy().tolist()) for shard in result}
    assert len(seeds) == shards
    own = split(batch, shards, range(shards // 2, shards))
    for shard, expected in zip(own, result[shards // 2 :], strict=True):
        assert (shard.number, shard.fraction) == (expected.number, expected.fraction)
        for tensor, expected_tensor in zip(shard.batch, expected.batch, strict=True):
            np.testing.assert_array_equal(tensor, expected_tensor)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_mean_is_the_mean_over_the_images_of_any_structure(shards):
    batch = batch_with(7)

    def function(shard: Batch) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        return [tf.reduce_mean(shard.clean, axis=0), tf.reduce_mean(shard.noisy)], {"one": tf.constant(1.0)}

    mean = Replicas(shards=shards).mean
    ((images, noisy), others), after = tf.function(lambda batch: mean(function, batch))(batch)
    np.testing.assert_allclose(images, batch.clean.numpy().mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(noisy, batch.noisy.numpy().mean(), atol=1e-6)
    assert float(others["one"]) == pytest.approx(1, rel=1e-6)
    assert after == []


@pytest.mark.parametrize("shards", [1, 2, 3, 9])
def test_changes_of_variables_are_averaged_over_the_images_and_other_variables_keep_their_bits(shards):
    """As moving averages: each shard starts from the present value, and the means are left to be assigned."""
    batch, moving, frozen = batch_with(7), tf.Variable(0.3), tf.Variable(random_values(3, 50))
    before = frozen.numpy().tobytes()

    def function(shard: Batch) -> tf.Tensor:
        moving.assign(0.9 * moving + 0.1 * tf.reduce_mean(shard.clean))
        return tf.reduce_mean(shard.noisy)

    @tf.function
    def update(batch: Batch) -> None:
        _, (new_moving, new_frozen) = Replicas(shards=shards).mean(function, batch, [moving, frozen])
        moving.assign(new_moving)
        frozen.assign(new_frozen)

    for _ in range(2):
        expected = 0.9 * float(moving) + 0.1 * float(batch.clean.numpy().mean())
        update(batch)
        assert float(moving) == pytest.approx(expected, rel=1e-5)
    assert frozen.numpy().tobytes() == before


def test_mean_adds_neighbours_first():
    """TensorFlow's optimizer of graphs would add a chain of tensors in another order."""
    batch = batch_with(5)
    mean, _ = tf.function(lambda batch: Replicas(shards=5).mean(lambda shard: shard.clean[0], batch))(batch)
    a, b, c, d, e = np.float32(0.2) * batch.clean.numpy()
    assert mean.numpy().tobytes() == (((a + b) + (c + d)) + e).tobytes()


def test_the_devices_share_the_shards_and_change_no_bit():
    devices, batch = runtime.select_devices([f"cpu:{number}" for number in range(3)]), batch_with(8)
    used: list[str] = []

    def function(shard: Batch) -> tf.Tensor:
        mean = tf.reduce_mean(tf.sin(shard.clean))
        used.append(mean.device.rpartition("device:")[2])
        return mean

    single = tf.function(lambda batch: Replicas(shards=4).mean(function, batch)[0])(batch)
    several = tf.function(lambda batch: Replicas(devices, shards=4).mean(function, batch)[0])(batch)
    assert single.numpy().tobytes() == several.numpy().tobytes()
    assert used == ["", "", "", "", "CPU:0", "CPU:0", "CPU:1", "CPU:2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tpu"], "expected some of .*cpu:0, .*, got tpu"),
        ([f"cpu:{part}" for part in range(5)], "expected some of .*cpu:0"),
        (["cpu", "cpu:1", "CPU:0"], "each once, .*, got cpu cpu:1 CPU:0"),
    ],
)
def test_devices_that_do_not_exist_or_are_repeated_are_rejected(names, message):
    assert runtime.select_devices(["cpu"]) == runtime.select_devices(["CPU:0"]) == ("CPU:0",)
    with pytest.raises(UsageError, match=f"^--devices: .*{message}"):
        runtime.select_devices(names)


@pytest.mark.parametrize(
    ("workers", "batch_size", "whole_batches", "expected"),
    [(2, 128, False, 2 * 2), (3, 128, False, 3 * 2), (2, 128, True, 2), (4, 16, False, 4), (1, 128, True, 1)],
)
def test_by_default_each_worker_has_a_power_of_two_of_shards(workers, batch_size, whole_batches, expected, monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 3)
    (first, *_) = group(workers)
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    config = RunConfig(batch_size=batch_size, intra_op_threads=threads)
    assert runtime.resolve(config, whole_batches, first)[0] == expected


def test_shards_that_the_workers_cannot_divide_are_rejected():
    message = r"^--shards: 6 cannot be divided among 4 workers; .*6 can be divided among 1, 3, 6$"
    with pytest.raises(UsageError, match=message):
        group(4)[0].with_shards(6)
