import functools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import idx_bytes

from dae.config import PYTHON_DATA, RunConfig
from dae.data import datasets, storage
from dae.data.images import Images
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import UsageError


@pytest.fixture
def mapped(monkeypatch):
    """Store every array in a temporary file, in small blocks."""
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "BLOCK", 10_000)


def test_mapped_images_are_those_that_were_stored(mapped, mnist):
    digits = mnist.test.pixels[:100]
    images = storage.materialize((120, 28, 28, 1), (digits[i : i + 7] for i in range(0, 100, 7)), np.uint8)
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, digits)
    indices = np.random.default_rng(0).permutation(100)[:60]
    np.testing.assert_array_equal(Images(images).take(indices).pixels, digits[indices])
    for selection in (slice(0, 100), slice(30, 50), slice(99, 100)):
        reverse = tf.range(len(digits[selection]))[::-1]
        np.testing.assert_array_equal(storage.gather_fn(images[selection])(reverse), digits[selection][::-1])
    np.testing.assert_array_equal(storage.gather_fn(images[20:][5:])(tf.constant([3])), digits[28:29])


def check_equal_batches(batches: tf.data.Dataset, expected: tf.data.Dataset) -> None:
    for batch, expected_batch in zip(batches, expected, strict=True):
        for values, expected_values in zip(batch, expected_batch, strict=True):
            np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize(("dtype", "is_paired"), [(np.uint16, True), (np.float32, False)])
def test_batches_of_mapped_images_of_several_sizes_are_those_of_images_in_memory(dtype, is_paired, mapped):
    config = RunConfig(batch_size=8, epochs=1, patch_size=16, augment=True, noise_level=0.1)
    shapes = np.random.default_rng(0).integers(16, 40, (8, 2))
    values = np.random.default_rng(1).random((int(shapes.prod(axis=1).sum()), 2 if is_paired else 1))
    rows = values.astype(np.float32) if dtype == np.float32 else (values * 255).astype(dtype)
    stored = storage.materialize(rows.shape, np.array_split(rows, 20), dtype)
    assert isinstance(stored, np.memmap)
    permutation = np.random.default_rng(2).permutation(8)
    kept, held = (Images(pixels, is_paired, shapes).take(permutation) for pixels in (stored, rows))
    assert isinstance(kept.pixels, np.memmap)
    in_memory = Images(np.array(held.pixels), is_paired, held.sizes)
    for make in (training_batches, functools.partial(evaluation_batches, purpose="test")):
        check_equal_batches(make(kept[3:7], config), make(in_memory[3:7], config))


def test_mapped_images_without_validation_images_have_no_validation_batches(mapped, mnist):
    data = {"x_train": mnist.test.pixels[:40], "x_test": mnist.test.pixels[:9]}
    splits = datasets.load(RunConfig(data=PYTHON_DATA, validation_examples=0, batch_size=8), data)
    assert isinstance(splits.train.pixels, np.memmap)
    assert list(evaluation_batches(splits.validation, RunConfig(), "validation")) == []


def test_folder_for_temporary_files_that_does_not_exist_is_rejected(mapped, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"none: .*GiB.*TMPDIR.*No such file"):
        datasets.load(RunConfig())


# Reads an IDX file of 1.9 GiB, sparse but for the digits at its end, while the process may allocate 1.5 GiB of memory,
# most of which TensorFlow's libraries and the stacks of its threads take.
WITH_LIMITED_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (1_500 << 20, 1_500 << 20))
import numpy as np
from dae import RunConfig
from dae.data import datasets, pipeline
config = RunConfig(data=sys.argv[1], batch_size=2000, epochs=1, shards=1)
splits = datasets.load(config)
assert sum(part.pixels.nbytes for part in (splits.train, splits.validation, splits.test)) > 1_900 << 20
bright = 0
for number, batch in enumerate(pipeline.training_batches(splits.train, config)):
    bright += int((batch.clean.numpy().max(axis=(1, 2, 3)) > 0.5).sum())
    if number == 20:
        break
batch = next(iter(pipeline.evaluation_batches(splits.validation, config, "validation")))
print(bright, batch.clean.numpy().max())
try:
    np.ones(1_900 << 20, np.uint8)
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.slow
def test_images_larger_than_the_memory_limit_are_trained_on(tmp_path, mnist):
    digits = mnist.train.pixels[:50_000]
    count = (1_950 << 20) // 784
    with open(tmp_path / "train-images-idx3-ubyte", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes())
        file.seek((count - len(digits)) * 784, 1)
        file.write(digits.tobytes())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(mnist.test.pixels[:9, ..., 0]))
    done = subprocess.run(
        [sys.executable, "-c", WITH_LIMITED_MEMORY, tmp_path], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    bright, brightest, *_ = done.stdout.split()
    # 45,000 of the 2.6 million training images are digits: about 724 of the 42,000 seen.
    assert 600 < int(bright) < 850
    assert float(brightest) == 1
    assert "the limit holds" in done.stdout
