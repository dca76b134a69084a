import dataclasses
import io
import pickle
import zipfile

import numpy as np
import pytest
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

from dae import datasets
from dae.config import RunConfig
from dae.errors import UsageError


def test_mnist_is_the_real_one(mnist):
    assert mnist.train.shape == (55_000, 28, 28, 1)
    assert mnist.validation.shape == (5_000, 28, 28, 1)
    assert mnist.test.shape == (10_000, 28, 28, 1)
    everything = np.concatenate([mnist.train, mnist.validation]) / 255.0
    assert everything.mean() == pytest.approx(0.13066, abs=1e-5)
    assert everything.std() == pytest.approx(0.30811, abs=1e-5)


def test_no_image_both_trains_and_validates(mnist):
    few = datasets.load(RunConfig(train_examples=1000, validation_examples=500))
    np.testing.assert_array_equal(few.train, mnist.train[:1000])
    np.testing.assert_array_equal(few.validation, mnist.validation[-500:])
    assert len(datasets.load(RunConfig(validation_examples=0)).train) == 60_000


def test_splits_that_leave_nothing_are_refused():
    with pytest.raises(UsageError, match="--validation-examples: 60000 of 60000"):
        datasets.load(RunConfig(validation_examples=60_000))
    with pytest.raises(UsageError, match="--train-examples: 55001 is more than the 55000"):
        datasets.load(RunConfig(train_examples=55_001))


def test_an_unknown_dataset_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="--dataset: unknown name 'mnits'; did you mean 'mnist'"):
        datasets.load(RunConfig(dataset="mnits"))


def test_a_damaged_copy_of_mnist_is_noticed(tmp_path, monkeypatch, mnist):
    changed = mnist.test.copy()
    changed[123, 4, 5] ^= 1
    train = np.concatenate([mnist.train, mnist.validation])
    np.savez(tmp_path / "mnist.npz", x_train=train[..., 0], x_test=changed[..., 0])
    monkeypatch.setattr(datasets, "MNIST_FILE", tmp_path / "mnist.npz")
    with pytest.raises(UsageError, match="is damaged"):
        datasets.load(RunConfig())


def test_a_file_of_ones_own_is_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "own.npz", x_train=images[:30], x_test=np.asfortranarray(images[30:]))
    splits = datasets.load(RunConfig(data=str(tmp_path / "own.npz"), validation_examples=5))
    np.testing.assert_array_equal(splits.train[..., 0], images[:25])
    np.testing.assert_array_equal(splits.validation[..., 0], images[25:30])
    np.testing.assert_array_equal(splits.test[..., 0], images[30:])


def test_other_images_than_a_run_was_made_with_are_refused(tmp_path):
    config = RunConfig(data=str(tmp_path / "own.npz"), validation_examples=1)
    dark, bright = np.zeros((9, 28, 28), np.uint8), np.ones((9, 28, 28), np.uint8)
    np.savez(tmp_path / "own.npz", x_train=dark, x_test=dark)
    made_with = dataclasses.replace(config, data_digest=datasets.load(config).digest)
    datasets.load(made_with)
    np.savez(tmp_path / "own.npz", x_train=dark, x_test=bright)
    with pytest.raises(UsageError, match=r"--data .*own.npz: its images are not those that the run was made with"):
        datasets.load(made_with)


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


GOOD = npy(np.zeros((9, 28, 28), np.uint8))


FUZZED = npz(x_train=npy(np.arange(9 * 28 * 28, dtype=np.uint8).reshape(9, 28, 28)), x_test=GOOD)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle of the data file was executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable .npz file"),
        (b"something else entirely", "not a readable .npz file"),
        (npz(x_train=GOOD, x_test=GOOD)[:-40], "not a readable .npz file"),
        (npz(x_train=GOOD[:50], x_test=GOOD), "not a readable .npz file"),
        (npz(x_train=GOOD), "has no array 'x_test'"),
        (npz(x_train=npy(np.zeros((9, 28, 28))), x_test=GOOD), "x_train is float64, not uint8"),
        (npz(x_train=npy(np.zeros((9, 784), np.uint8)), x_test=GOOD), r"x_train has shape \(9, 784\)"),
        (npz(x_train=npy(np.zeros((0, 28, 28), np.uint8)), x_test=GOOD), r"x_train has shape \(0, 28, 28\)"),
        (npz(x_train=npy(np.zeros((9, 28, 28, 2), np.uint8)), x_test=GOOD), "C 1 or 3"),
        (npz(x_train=npy(np.zeros((9, 10, 28), np.uint8)), x_test=GOOD), "SSIM needs that"),
        (npz(x_train=header((-9, -28, 28)) + b"12", x_test=GOOD), "N from 1"),
        (npz(x_train=npy(np.zeros((9000, 28, 28), np.uint8)), x_test=GOOD), "packed more than 200-fold"),
        (npz(x_train=b"\x93NUMPY\x03\x00" + GOOD[8:], x_test=GOOD), r"format \(3, 0\), not 1.0 or 2.0"),
        (npz(x_train=GOOD.replace(b"{'descr'", b"{{'descr"), x_test=GOOD), "not a readable .npz file"),
        (npz(x_train=npy(np.zeros((9, 28, 20), np.uint8)), x_test=GOOD), "x_train has images of"),
        (npz(x_train=header((2**40, 28, 28)) + b"12", x_test=GOOD), "holds another number of bytes"),
        (npz(x_train=header((2**70, 28, 28)) + b"12", x_test=GOOD), "holds another number of bytes"),
        (npz(x_train=npy(np.array([Hostile()], object)), x_test=GOOD), "x_train is object, not uint8"),
        (pickle.dumps(Hostile()), "not a readable .npz file"),
    ],
)
def test_a_broken_or_hostile_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        datasets.load(RunConfig(data=str(path), validation_examples=1))
    assert str(caught.value).startswith(f"--data: {path}: ")
    assert "\n" not in str(caught.value)


@fuzz
@given(st.data())
def test_any_damage_to_a_file_is_refused_in_one_line_or_leaves_images(tmp_path_factory, data):
    content = bytearray(FUZZED)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(content[:cut])
    try:
        splits = datasets.load(RunConfig(data=str(path), validation_examples=1))
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert splits.train.dtype == np.uint8


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        datasets.load(RunConfig(data=str(tmp_path / "none.npz")))
    with pytest.raises(UsageError, match="not a readable"):
        datasets.load(RunConfig(data=str(tmp_path)))
