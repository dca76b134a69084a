import dataclasses
import gzip
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import idx_bytes

from dae.config import RunConfig
from dae.data import datasets
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError


def test_mnist_has_its_known_size_mean_and_deviation(mnist):
    assert mnist.train.pixels.shape == (55_000, 28, 28, 1)
    assert mnist.validation.pixels.shape == (5_000, 28, 28, 1)
    assert mnist.test.pixels.shape == (10_000, 28, 28, 1)
    everything = np.concatenate([mnist.train.pixels, mnist.validation.pixels]) / 255.0
    assert everything.mean() == pytest.approx(0.13066, abs=1e-5)
    assert everything.std() == pytest.approx(0.30811, abs=1e-5)


def test_first_images_train_and_last_images_validate(mnist):
    few = datasets.load(RunConfig(train_examples=1000, validation_examples=500))
    np.testing.assert_array_equal(few.train.pixels, mnist.train.pixels[:1000])
    np.testing.assert_array_equal(few.validation.pixels, mnist.validation.pixels[-500:])
    assert len(datasets.load(RunConfig(validation_examples=0)).train) == 60_000


def test_splits_that_need_too_many_images_are_refused():
    with pytest.raises(UsageError, match=r"--validation-examples: 60000\b.*\b60000\b"):
        datasets.load(RunConfig(validation_examples=60_000))
    with pytest.raises(UsageError, match=r"--train-examples: 55001\b.*\b55000\b"):
        datasets.load(RunConfig(train_examples=55_001))


def test_unknown_dataset_is_refused_with_the_most_similar_name():
    with pytest.raises(UsageError, match=r"--dataset: .*'mnits'.*'mnist'"):
        datasets.load(RunConfig(dataset="mnits"))


def test_damaged_mnist_is_refused(tmp_path, monkeypatch, mnist):
    changed = mnist.test.pixels.copy()
    changed[123, 4, 5] ^= 1
    train = np.concatenate([mnist.train.pixels, mnist.validation.pixels])
    np.savez(tmp_path / "mnist.npz", x_train=train[..., 0], x_test=changed[..., 0])
    monkeypatch.setattr(datasets, "MNIST_FILE", tmp_path / "mnist.npz")
    with pytest.raises(UsageError, match=r"damaged \(x_test\)"):
        datasets.load(RunConfig())


def test_training_labels_are_those_of_mnist(mnist):
    labels = datasets.training_labels(RunConfig())
    assert labels is not None
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert len(labels) == len(mnist.train) + len(mnist.validation)
    assert datasets.training_labels(RunConfig(data="own.npz")) is None
    assert datasets.training_labels(RunConfig(dataset="cifar10")) is None


def test_images_that_differ_from_the_recorded_digest_are_refused(tmp_path):
    config = RunConfig(data=str(tmp_path / "own.npz"), validation_examples=1)
    bright = np.full((9, 28, 28), 254, np.uint8)
    brighter = bright + np.uint8(1)
    np.savez(tmp_path / "own.npz", x_train=bright, x_test=bright)
    recorded = dataclasses.replace(config, data_digest=datasets.load(config).digest)
    datasets.load(recorded)
    np.savez(tmp_path / "own.npz", x_train=bright, x_test=brighter)
    with pytest.raises(UsageError, match=rf"--data: .*own\.npz: .*differ.*{recorded.data_digest}"):
        datasets.load(recorded)


def test_missing_file_unknown_format_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.npz: no such file"):
        datasets.load(RunConfig(data=str(tmp_path / "none.npz")))
    for name in ("picture.tiff", "images.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(UsageError, match=rf"{name}: expected a folder, .*\.npz, \.npy or IDX"):
            datasets.load(RunConfig(data=str(tmp_path / name)))
    (tmp_path / "picture.tiff").unlink()
    with pytest.raises(UsageError, match=r"holds no pictures \(but 1 \.csv\); expected .*\.png"):
        datasets.load(RunConfig(data=str(tmp_path)))


@pytest.mark.parametrize("settings", [{"image_size": 32}, {"skip_broken": True}, {"grey": True, "patch_size": 64}])
def test_a_missing_path_is_reported_before_anything_else(settings, tmp_path):
    for name in ("nowhere", "nowhere.npz", "below/nowhere"):
        path = tmp_path / name
        with pytest.raises(UsageError, match=rf"^--data: {path}: no such file or folder$"):
            datasets.load(RunConfig(data=str(path), **settings))
        with pytest.raises(
            UsageError, match=r": no such file or folder; if it was moved, add --data with its new place"
        ):
            datasets.load(RunConfig(data=str(path), data_digest="0" * 64, **settings))


def test_image_size_is_refused_without_a_folder_of_pictures():
    with pytest.raises(UsageError, match=r"--image-size: .*folder of pictures"):
        datasets.load(RunConfig(image_size=32))


def test_integers_of_only_0_and_1_are_refused_without_a_value_range_and_then_are_black_and_white(tmp_path, mnist):
    binary = mnist.test.pixels[:20] // 255
    np.save(tmp_path / "own.npy", binary)
    config = RunConfig(data=str(tmp_path / "own.npy"))
    message = r"--data: .*own\.npy: nearly black: the largest value is 1, .*white is 255; add --value-range 0 1 if 1"
    with pytest.raises(UsageError, match=message):
        datasets.load(config)
    splits = datasets.load(dataclasses.replace(config, value_range=(0, 1)))
    assert max(part.pixels.max() for part in (splits.train, splits.test)) == binary.max() == 1
    (batch,) = evaluation_batches(splits.test, dataclasses.replace(config, value_range=(0, 1)), "test")
    assert set(np.unique(batch.clean)) == {0, 1}


def test_images_without_a_test_part_get_one_that_is_independent_of_the_seed(tmp_path, mnist):
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
    found = sorted(image.tobytes() for part in (splits.train, splits.validation, splits.test) for image in part.pixels)
    assert found == sorted(image.tobytes() for image in digits)


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 0, 1)), (9, (8, 0, 1)), (12, (10, 1, 1))])
def test_few_images_are_split_with_a_note_on_the_batch_size(count, sizes, tmp_path, mnist):
    np.save(tmp_path / "own.npy", mnist.test.pixels[:count])
    splits = datasets.load(RunConfig(data=str(tmp_path / "own.npy")))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert f"--batch-size 128 exceeds the {sizes[0]} training images" in splits.notes[-1]


def test_single_image_is_refused(tmp_path, mnist):
    np.save(tmp_path / "own.npy", mnist.test.pixels[:1])
    with pytest.raises(UsageError, match="at least two images"):
        datasets.load(RunConfig(data=str(tmp_path / "own.npy")))


# Runs in a separate process, since Keras reads KERAS_HOME when it is imported.
LOAD_BOTH = """
from dae import RunConfig, UsageError
from dae.data import datasets
from dae.data.pipeline import evaluation_batches
for name in datasets.KERAS_FILES:
    try:
        print("loaded:", name, datasets.load(RunConfig(dataset=name)).train.pixels.shape)
    except UsageError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_keras_datasets_are_read_from_disk_and_errors_name_the_missing_file(tmp_path, mnist):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, images in (("train", mnist.train.pixels[:40]), ("t10k", mnist.test.pixels[:10])):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[..., 0])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + len(images))))
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:1"}  # no network
    command = [sys.executable, "-c", LOAD_BOTH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    loaded, refused = (line for line in done.stdout.splitlines() if line.startswith(("loaded: ", "refused: ")))
    assert loaded == "loaded: fashion_mnist (36, 28, 28, 1)", done.stderr
    assert refused.startswith("refused: --dataset cifar10: ")
    assert refused.endswith(datasets.KERAS_FILES["cifar10"].format(tmp_path / "datasets"))
