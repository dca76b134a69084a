import json
from dataclasses import replace

import pytest
import tensorflow as tf
from helpers import random_values
from hypothesis import given
from hypothesis import strategies as st

from dae import replicas, runtime
from dae.config import RunConfig
from dae.errors import UsageError
from dae.replicas import ALONE, Replicas, from_environment

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
    ("text", "message"),
    [
        ("no", "expected {.*got 'no'"),
        ("[]", r"got '\[\]'"),
        (tf_config({"type": "worker", "index": 0}, worker=[1, 2]), "HOST:PORT"),
        (tf_config({"type": "worker", "index": 0}, worker=["nowhere", "a:1"]), "HOST:PORT"),
        (tf_config({"type": "worker", "index": 0}, worker="a:1"), "HOST:PORT"),
        (tf_config([], worker=["a:1", "b:2"]), "no task"),
        (tf_config({"type": "worker", "index": 2}, worker=["a:1", "b:2"]), "no task worker 2"),
        (tf_config({"type": "ps", "index": 0}, worker=["a:1"], ps=["b:2"]), "only 'chief' and 'worker'"),
    ],
)
def test_another_tf_config_is_refused(text, message, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match=f"^TF_CONFIG: .*{message}"):
        from_environment()


@given(st.integers(1, 6), st.integers(1, 64))
def test_each_shard_has_one_worker(workers, shards):
    each = [Replicas((), worker, ADDRESSES[:workers]) for worker in range(workers)]
    try:
        each[0].check(shards)
    except UsageError as error:
        assert f"{shards} cannot be divided among {workers} workers" in str(error)
        assert shards % workers or bin(shards // workers).count("1") > 1
    else:
        assert [shard for one in each for shard in one.shards(shards)] == list(range(shards))


@given(st.integers(1, 6), st.sampled_from([1, 2, 4, 8]), st.integers(0, 100))
def test_sums_have_the_same_bits_for_any_number_of_workers(workers, each, seed):
    """The sums of each worker's shards are added as `Replicas.sum` does after it has gathered them."""
    rows = random_values(seed, workers * each, 3)
    whole = replicas._pairwise_sum(list(rows))
    parts = [replicas._pairwise_sum(list(part)) for part in rows.reshape(workers, each, 3)]
    assert replicas._pairwise_sum(parts).tobytes() == whole.tobytes()
    assert whole == pytest.approx(rows.sum(axis=0), abs=1e-4)


def test_sum_keeps_shapes_and_the_order_of_additions():
    """TensorFlow's optimizer of graphs would add a chain of tensors in another order."""
    shards = [[tf.constant(random_values(seed, 2, 3)), tf.constant(float(seed))] for seed in range(5)]
    matrix, scalar = tf.function(lambda: ALONE.sum(shards))()
    a, b, c, d, e = (one.numpy() for one, _ in shards)
    assert matrix.numpy().tobytes() == (((a + b) + (c + d)) + e).tobytes()
    assert scalar.shape == ()
    assert float(scalar) == 10


def test_exchange_without_other_workers_returns_what_it_is_given():
    assert ALONE.exchange(b"abc") == [b"abc"]
    assert ALONE.maximum(15) == 15


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gpu:7"], "there is no gpu:7; there are .*cpu:0"),
        (["tpu"], "there is no tpu:0"),
        (["cpu:1"], "expected GPUs, or cpu:0, cpu:1 and so on, got cpu:1"),
        (["cpu", "cpu:0"], "expected GPUs, or cpu:0"),
        (["gpu:9", "cpu"], "expected GPUs, or cpu:0"),
        ([f"cpu:{part}" for part in range(5)], "TensorFlow has started"),
    ],
)
def test_devices_that_do_not_exist_are_refused(names, message):
    with pytest.raises(UsageError, match=f"^--devices: {message}|^--devices: .*{message}"):
        runtime.select_devices(names)


def test_the_processor_is_a_device():
    assert runtime.select_devices(["cpu"]) == ("CPU:0",)
    assert runtime.select_devices(["CPU:0"]) == ("CPU:0",)


@pytest.mark.parametrize(
    ("workers", "batch_size", "whole_batches", "expected"),
    [(2, 128, False, 2 * 2), (3, 128, False, 3 * 2), (2, 128, True, 2), (4, 16, False, 4), (1, 128, True, 1)],
)
def test_shards_are_divided_among_the_workers(workers, batch_size, whole_batches, expected, monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 3)
    group = Replicas((), 0, ADDRESSES[:workers])
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    config = RunConfig(batch_size=batch_size, intra_op_threads=threads)
    assert runtime.resolve(config, whole_batches, group).shards == expected


def test_shards_that_the_workers_cannot_divide_are_refused():
    with pytest.raises(
        UsageError, match=r"^--shards: 6 cannot be divided among 4 workers; .*6 can be divided among 1, 3, 6$"
    ):
        runtime.resolve(RunConfig(shards=6), replicas=Replicas((), 0, ADDRESSES[:4]))
