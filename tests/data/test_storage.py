import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from dae.analysis import reproducibility
from dae.config import RunConfig
from dae.data import datasets, storage
from dae.errors import UsageError
from dae.training import trainer


@pytest.fixture
def mapped(monkeypatch):
    """Every array that is stored lies in a temporary file."""
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "BLOCK", 10_000)


def test_what_is_mapped_from_a_file_is_what_was_stored(mapped, mnist):
    digits = mnist.test[:100]
    images = storage.stored((120, 28, 28, 1), (digits[i : i + 7] for i in range(0, 100, 7)))
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, digits)
    places = np.random.default_rng(0).permutation(100)[:60]
    np.testing.assert_array_equal(storage.selected(images, places), digits[places])
    for part in (slice(0, 100), slice(30, 50), slice(99, 100)):
        indices = tf.range(len(digits[part]))[::-1]
        np.testing.assert_array_equal(storage.reader(images[part])(indices), digits[part][::-1])
    np.testing.assert_array_equal(storage.reader(images[20:][5:])(tf.constant([3])), digits[28:29])


def test_a_run_on_mapped_images_is_the_run_on_images_in_memory_to_the_bit(tiny_run, tmp_path, mapped):
    config = trainer.configs.read(tiny_run / "config.json")
    assert isinstance(datasets.load(config).train, np.memmap)
    trainer.train(config, tmp_path / "run")
    assert reproducibility.first_difference(tmp_path / "run", tiny_run) is None


def test_a_full_disk_is_said(mapped, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"cannot be unpacked to .*none .No such file.*; TMPDIR may"):
        datasets.load(RunConfig())


# Of an IDX file of 1.9 GiB, sparse but for its digits at the end, under a cap of 1.5 GiB for all that a process holds
# for itself. TensorFlow's libraries and its threads' stacks are most of what is used.
UNDER_A_CAP = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (1_500 << 20, 1_500 << 20))
import numpy as np
from dae import RunConfig
from dae.data import datasets
from dae.data import pipeline
config = RunConfig(data=sys.argv[1], batch_size=2000, epochs=1, micro_batches=1)
splits = datasets.load(config)
assert sum(part.nbytes for part in (splits.train, splits.validation, splits.test)) > 1_900 << 20
bright = 0
for number, (noisy, clean) in enumerate(pipeline.training_batches(splits.train, config)):
    bright += int((clean.numpy().max(axis=(1, 2, 3)) > 0.5).sum())
    if number == 20:
        break
noisy, clean = next(iter(pipeline.evaluation_batches(splits.validation, config, "validation")))
print(bright, clean.numpy().max())
try:
    held = np.ones(1_900 << 20, np.uint8)
except MemoryError:
    print("the cap holds")
"""


def test_images_beyond_memory_are_trained_on_under_a_cap_below_their_size(tmp_path, mnist):
    digits = mnist.train[:50_000]
    count = (1_950 << 20) // 784
    with open(tmp_path / "train-images-idx3-ubyte", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes())
        file.seek((count - len(digits)) * 784, 1)
        file.write(digits.tobytes())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + np.array([9, 28, 28], ">u4").tobytes() + mnist.test[:9].tobytes()
    )
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_CAP, tmp_path], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    bright, brightest, *_ = done.stdout.split()
    # A share of 45,000 / 2.6 million of the 42,000 images seen are digits.
    assert 600 < int(bright) < 850
    assert float(brightest) == 1
    assert "the cap holds" in done.stdout
