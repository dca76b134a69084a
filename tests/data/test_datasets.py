import dataclasses
import gzip
import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import idx_bytes

from dae.config import RunConfig, preset
from dae.data import datasets
from dae.errors import UsageError


def test_first_images_train_and_last_images_validate(mnist):
    assert mnist.train.pixels.shape == (55_000, 28, 28, 1)
    assert mnist.validation.pixels.shape == (5_000, 28, 28, 1)
    assert mnist.test.pixels.shape == (10_000, 28, 28, 1)
    few = datasets.load(RunConfig(train_examples=1000, validation_examples=500))
    np.testing.assert_array_equal(few.train.pixels, mnist.train.pixels[:1000])
    np.testing.assert_array_equal(few.validation.pixels, mnist.validation.pixels[-500:])
    assert len(datasets.load(RunConfig(validation_examples=0)).train) == 60_000


def test_mnist_is_that_of_its_readme():
    readme = (datasets.MNIST_FILE.parent / "README.md").read_text()
    for name, images in datasets.mnist().items():
        assert f"| {name} | {len(images)} x 28 x 28 | {hashlib.sha256(images.data).hexdigest()} |" in readme


def test_unknown_format_and_empty_folder_are_rejected(tmp_path):
    for name in ("picture.tiff", "images.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(UsageError, match=rf"{name}: expected a folder, .*\.npz, \.npy or IDX"):
            datasets.load(RunConfig(data=str(tmp_path / name)))
    (tmp_path / "picture.tiff").unlink()
    with pytest.raises(UsageError, match=r"holds no pictures \(but 1 \.csv\); expected .*\.png"):
        datasets.load(RunConfig(data=str(tmp_path)))


@pytest.mark.parametrize(
    ("brightest", "dtype", "message"),
    [
        (0.2, np.float32, "value is 0.2, but white is 1; add --value-range 0 0.2 if 0.2 is white"),
        (1, np.uint8, "value is 1, but white is 255; add --value-range 0 1 if 1 is white"),
        (900, np.uint16, "value is 900, but white is 65535; add --value-range 0 1023 if 1023 is white"),
        (0, np.uint8, "value is 0, but white is 255"),
    ],
)
def test_nearly_black_images_are_accepted_with_a_warning(brightest, dtype, message, tmp_path, mnist, capsys):
    images = (mnist.test.pixels[:20] / 255 >= 0.5).astype(dtype) * dtype(brightest)
    np.save(tmp_path / "own.npy", images)
    config = RunConfig(data=str(tmp_path / "own.npy"))
    splits = datasets.load(config)
    assert max(split.pixels.max() for split in (splits.train, splits.test)) == images.max()
    warning = f"warning: --data: {tmp_path}/own.npy: nearly black: the largest {message}\n"
    assert capsys.readouterr().err == warning
    datasets.load_test(config)
    assert capsys.readouterr().err == warning
    datasets.load(dataclasses.replace(config, value_range=(0, brightest or 255)))
    assert capsys.readouterr().err == ""


def test_images_without_a_test_split_get_one_that_is_independent_of_the_seed(tmp_path, mnist):
    digits = mnist.test.pixels[:300]
    np.savez(tmp_path / "one.npz", whatever=digits[..., 0])
    np.savez(tmp_path / "train.npz", x_train=digits, y_train=np.arange(300))
    np.save(tmp_path / "own.npy", digits)
    loaded = [
        datasets.load(RunConfig(data=str(tmp_path / name), seed=seed))
        for seed, name in enumerate(("one.npz", "train.npz", "own.npy"))
    ]
    for splits in loaded:
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (243, 27, 30)
        assert splits.digest == loaded[0].digest
        assert splits.notes[2].startswith("test: 30 images")
        assert splits.notes[2].endswith("drawn from the others by a fixed seed")
    found = sorted(
        image.tobytes() for split in (splits.train, splits.validation, splits.test) for image in split.pixels
    )
    assert found == sorted(image.tobytes() for image in digits)


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 0, 1)), (9, (8, 0, 1)), (12, (10, 1, 1))])
def test_few_images_are_split_and_a_single_one_is_rejected(count, sizes, tmp_path, mnist):
    config = RunConfig(data=str(tmp_path / "own.npy"))
    np.save(tmp_path / "own.npy", mnist.test.pixels[:count])
    splits = datasets.load(config)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    np.save(tmp_path / "own.npy", mnist.test.pixels[:1])
    with pytest.raises(UsageError, match="at least two images"):
        datasets.load(config)


def test_the_number_of_training_images_is_a_limit(tmp_path, mnist):
    np.save(tmp_path / "own.npy", mnist.test.pixels[:9])
    config = preset("good", data=str(tmp_path / "own.npy"))
    assert len(datasets.load(preset("good")).train) == 24_000
    assert len(datasets.load(preset("good", train_examples=40_000)).train) == 40_000
    assert len(datasets.load(replace(config, train_examples=5)).train) == 5
    splits = datasets.load(config)
    assert len(splits.train) == 8
    assert splits.notes[0].endswith("uint8 from 0 to 255, fewer than --train-examples 24000")


# Runs in a separate process, since Keras reads KERAS_HOME when it is imported.
LOAD_BOTH = """
from dae import RunConfig, UsageError
from dae.data import datasets
for name in ("fashion_mnist", "cifar10"):
    try:
        print("loaded:", name, datasets.load(RunConfig(dataset=name)).train.pixels.shape)
    except UsageError as error:
        print("rejected:", error)
"""


@pytest.mark.slow
def test_keras_datasets_are_read_from_disk_and_others_are_rejected(tmp_path, mnist):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for split, images in (("train", mnist.train.pixels[:40]), ("t10k", mnist.test.pixels[:10])):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[..., 0])))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + len(images))))
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:1"}  # no network
    command = [sys.executable, "-c", LOAD_BOTH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    loaded, rejected = (line for line in done.stdout.splitlines() if line.startswith(("loaded: ", "rejected: ")))
    assert loaded == "loaded: fashion_mnist (36, 28, 28, 1)", done.stderr
    assert rejected.startswith("rejected: --dataset cifar10: Keras could not download or read it (")
