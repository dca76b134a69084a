"""Tests of .npz, .npy and IDX files, loaded as a user's --data."""

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import fuzz, idx_bytes, rejected
from hypothesis import given
from hypothesis import strategies as st

from dae.config import PYTHON_DATA, RunConfig
from dae.data import datasets
from dae.data.images import to_grey
from dae.data.pipeline import evaluation_batches
from dae.errors import UsageError


def load(path: Path, **settings) -> datasets.Splits:
    return datasets.load(RunConfig(data=str(path), **settings))


def check_rejected(path: Path, message: str, **settings) -> None:
    """Assert that loading raises an error of one line, which begins with the path and matches `message`."""
    with rejected(f"--data: {path}: ", match=message):
        load(path, **settings)


def npz_bytes(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("dtype", "values", "value_range"),
    [
        (np.float16, lambda digits: (digits / 255 + np.pi / 1000).clip(0, 1), None),
        (np.float32, lambda digits: (digits / 255 + np.pi / 1000).clip(0, 1), None),
        (np.float64, lambda digits: (digits / 255 + np.pi / 1000).clip(0, 1), None),
        (np.float32, lambda digits: digits / 127.5 - 1, (-1, 1)),
        (np.float64, lambda digits: digits + 0.25, (0, 255.25)),
        (">f4", lambda digits: digits / 51, (0, 5)),
        (np.float32, lambda digits: digits / 255 * 0.2 - 0.1, (-0.1, 0.1)),  # in float32, 0.1 is greater
        (np.uint8, lambda digits: digits, None),
        (np.uint8, np.asfortranarray, None),
        (np.uint8, lambda digits: digits // 255, (0, 1)),
        (np.uint8, lambda digits: digits // 2 + 50, (50, 250)),
        (np.uint16, lambda digits: digits.astype(np.uint16) * 257, None),
        (np.uint16, lambda digits: digits.astype(np.uint16) * 16, (0, 4080)),
        (">u2", lambda digits: digits.astype(np.uint16) * 16, (0, 4080)),
        (np.uint32, lambda digits: digits.astype(np.uint32) * 2**16, (0, 255 * 2**16)),
        (np.int16, lambda digits: digits.astype(np.int16) * 8 - 1000, (-1000, 1040)),
        (np.int64, lambda digits: digits.astype(np.int64) * 16 + 7, (0, 4095)),
        (np.bool_, lambda digits: digits > 127, (0, 1)),
    ],
)
def test_values_of_any_type_and_range_are_read_at_full_precision(dtype, values, value_range, tmp_path, mnist):
    array = values(mnist.test.pixels[:20, ..., 0]).astype(dtype)
    np.savez(tmp_path / "own.npz", x_train=array, x_test=array)
    config = RunConfig(
        data=str(tmp_path / "own.npz"), value_range=value_range, validation_examples=0, noise_level=0, batch_size=20
    )
    splits = datasets.load(config)
    (batch,) = evaluation_batches(splits.test, config, "test")
    low, high = value_range or (0, 1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max)
    expected = (array.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    for images in (batch.clean, batch.noisy):
        np.testing.assert_array_equal(images[..., 0], expected)
    assert splits.test.dtype.isnative
    least, most = array.astype(np.float32).min(), array.astype(np.float32).max()
    assert splits.notes[0] == f"train: 20 images, 28 x 28, grey, {splits.train.dtype} from {least:g} to {most:g}"


@pytest.mark.parametrize(
    ("value", "value_range", "message"),
    [
        (255.0, None, "train has values from 255 to 255, but black is 0 and white 1"),
        (1e300, None, "train has values from inf to inf, but black is 0 and white 1; --value-range sets others"),
        (-2, (-1, 1), "train has values from -2 to -2, but black is -1 and white 1"),
        (256, (0, 255), "train has values from 256 to 256, but black is 0 and white 255"),
        (np.uint16(4095), (0, 1000), "train has values from 4095 to 4095, but black is 0 and white 1000"),
        (np.uint8(99), (100, 200), "train has values from 99 to 99, but black is 100 and white 200"),
        (1j, (0, 1), "got complex128"),
    ],
)
def test_values_outside_their_range_are_rejected_in_one_line(value, value_range, message, tmp_path):
    np.save(tmp_path / "own.npy", np.full((9, 28, 28), value))
    check_rejected(tmp_path / "own.npy", message, value_range=value_range)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[[0.5], []]], r"^data: expected arrays \(setting an array element"),
        ({"x": "photos"}, r"^data: expected images, .* got x \(\)"),
    ],
)
def test_data_in_memory_must_be_arrays(data, message):
    with pytest.raises(UsageError, match=message):
        datasets.load(RunConfig(data=PYTHON_DATA), data)


def test_grey_converts_arrays_of_colour_and_leaves_others(tmp_path):
    coloured = np.random.default_rng(0).random((20, 28, 28, 3))
    for x, expected in ((coloured, to_grey(coloured.astype(np.float32))), (coloured[..., 0], coloured[..., :1])):
        np.savez(tmp_path / "own.npz", x_train=x, x_test=x)
        pixels = load(tmp_path / "own.npz", grey=True, validation_examples=0).train.pixels
        np.testing.assert_array_equal(pixels, expected.astype(np.float32))


def test_highly_compressible_floats_are_accepted(tmp_path):
    squares = np.zeros((2000, 32, 32))
    squares[:, 8:16, 8:16] = 1
    path = tmp_path / "squares.npz"
    np.savez_compressed(path, squares)
    assert squares.nbytes > 100 * path.stat().st_size
    assert len(load(path).test) == 200


@pytest.mark.parametrize(
    ("axes", "shape", "order"),
    [
        ("YXZ", (20, 30, 24), (1, 2, 0)),
        ("xyz", (20, 30, 24), (2, 1, 0)),
        ("TZYX", (4, 5, 30, 24), (0, 1, 2, 3)),
        ("NCYX", (20, 30, 24, 3), (0, 3, 1, 2)),
        ("CYXT", (20, 30, 24, 3), (3, 1, 2, 0)),
    ],
)
def test_axes_name_the_rows_columns_channels_and_images_of_an_array(axes, shape, order, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 30, 24, 3), np.uint8)
    images = images if "C" in axes else images[..., 0]
    np.savez(tmp_path / "own.npz", x_train=images.reshape(shape).transpose(order), labels=np.arange(20))
    splits = load(tmp_path / "own.npz", axes=axes, validation_examples=0)
    expected = datasets.load(RunConfig(data=PYTHON_DATA, axes="NYXC"[: images.ndim], validation_examples=0), images)
    assert splits.digest == expected.digest


class Hostile:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle in a data file was executed",))


GOOD = npy_bytes(np.zeros((9, 28, 28), np.uint8))
WITH_NAN = np.ones((9, 28, 28), np.float32)
WITH_NAN[7, 3, 4] = np.nan


def zeros(shape: tuple[int, ...], dtype: type = np.uint8) -> bytes:
    return npy_bytes(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not readable", id="empty"),
        pytest.param(npz_bytes(x_train=GOOD, x_test=GOOD)[:-40], "not readable", id="cut archive"),
        pytest.param(npz_bytes(x_train=GOOD[:50], x_test=GOOD), "not readable", id="cut header"),
        pytest.param(npz_bytes(x_train=GOOD.replace(b"{'d", b"{{'d"), x_test=GOOD), "not readable", id="bad header"),
        pytest.param(npz_bytes(x_train=GOOD[:-9], x_test=GOOD), "not readable", id="cut array"),
        pytest.param(npz_bytes(x_test=GOOD, y_test=GOOD), "no training images, only test; expected", id="no x_train"),
        pytest.param(npz_bytes(), "expected images.* got none", id="no arrays"),
        pytest.param(npz_bytes(x_train=zeros((9, 28, 28), np.int64)), "x_train: .*uint8.* got int64", id="int64"),
        pytest.param(npz_bytes(x_train=npy_bytes(WITH_NAN)), "values from nan to nan,", id="nan"),
        pytest.param(npz_bytes(x_train=zeros((9, 784))), r"got x_train \(9, 784\)", id="flat images"),
        pytest.param(npz_bytes(x_train=zeros((9, 28, 28, 2))), r"C 1 or 3, got \(9, 28, 28, 2\)", id="two channels"),
        pytest.param(npz_bytes(x_train=zeros((9, 10, 28, 1))), r"SSIM, got 10 x 28", id="small, with channels"),
        pytest.param(npz_bytes(x_train=zeros((40, 28, 20))), r"--axes NYX or.* YXN", id="slices last"),
        pytest.param(npz_bytes(x_train=zeros((28, 28, 28))), r"--axes NYX or.* YXN", id="a cube"),
        pytest.param(npz_bytes(x_train=zeros((3, 28, 28))), r"--axes CYX or NYX", id="channels first"),
        pytest.param(npz_bytes(x_train=zeros((9, 3, 28, 28))), r"--axes NCYX", id="channels second"),
        pytest.param(npz_bytes(x_train=zeros((9, 10, 28))), r"got \(9, 10, 28\)", id="small images"),
        pytest.param(npz_bytes(x_train=npy_header((-9, -28, 28)) + bytes(7056)), "not readable", id="negative"),
        pytest.param(
            npz_bytes(x_train=zeros((9, 28, 28, 3)), x_test=GOOD), r"\(28, 28, 3\).*\(28, 28, 1\)", id="sizes"
        ),
        pytest.param(npz_bytes(x_train=b"\x93NUMPY\x03\x00" + GOOD[8:]), r"not readable", id="new format"),
        pytest.param(npz_bytes(x_train=npy_header((2**70, 28, 28)) + b"12"), "not readable", id="claims 2**70"),
        pytest.param(npz_bytes(x_train=npy_bytes(np.full((9, 28, 28), Hostile()))), "Object arrays", id="pickled"),
        pytest.param(pickle.dumps(Hostile()), "not readable", id="pickle"),
    ],
)
def test_damaged_or_hostile_npz_is_rejected_in_one_line(tmp_path, content, message):
    (tmp_path / "data.npz").write_bytes(content)
    check_rejected(tmp_path / "data.npz", message, validation_examples=1)


FUZZED = npz_bytes(x_train=npy_bytes(np.arange(9 * 28 * 28, dtype=np.uint8).reshape(9, 28, 28)), x_test=GOOD)


@fuzz
@given(st.data())
def test_randomly_damaged_npz_loads_or_is_rejected_in_one_line(tmp_path_factory, data):
    content = bytearray(FUZZED)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(content[:end])
    try:
        splits = load(path, validation_examples=1)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert splits.train.pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-test-images-idx3-ubyte"),
    ],
)
def test_folder_of_idx_files_is_read(train, test, tmp_path, mnist):
    for name, images in ((train, mnist.train.pixels[:30, ..., 0]), (test, mnist.test.pixels[:9, ..., 0])):
        content = idx_bytes(images)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"labels are ignored")
    splits = load(tmp_path, batch_size=8)
    np.testing.assert_array_equal(splits.train.pixels, mnist.train.pixels[:27])
    np.testing.assert_array_equal(splits.validation.pixels, mnist.train.pixels[27:30])
    np.testing.assert_array_equal(splits.test.pixels, mnist.test.pixels[:9])
    assert splits.notes == (
        "train: 27 images, 28 x 28, grey, uint8 from 0 to 255",
        "validation: 3 images, 28 x 28, grey, uint8 from 0 to 255, the last of those to train on",
        "test: 9 images, 28 x 28, grey, uint8 from 0 to 255",
    )


def test_single_idx_file_is_split_into_training_and_test_images(tmp_path, mnist):
    path = tmp_path / "train-images-idx4-ubyte"
    path.write_bytes(idx_bytes(np.repeat(mnist.test.pixels[:20], 3, axis=-1)))
    for data in (path, tmp_path):
        splits = load(data)
        assert (splits.train.image_shape, len(splits.train), len(splits.test)) == ((28, 28, 3), 17, 2)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda content: content[:-1], "size of the file", id="cut"),
        pytest.param(lambda content: content + b"x", "size of the file", id="too long"),
        pytest.param(lambda content: b"", "not readable", id="empty"),
        pytest.param(lambda content: content[:2] + b"\x0d" + content[3:], "IDX file of images", id="floats"),
        pytest.param(lambda content: content[:4] + bytes(4) + content[8:], "size of the file", id="no images"),
        pytest.param(lambda content: content[:4] + b"\0\1\0\0" + content[8:], "size of the file", id="2**16"),
        # More than a gzipped file of this size can hold.
        pytest.param(lambda content: content[:4] + 4 * b"\xff" + content[8:], "size of the file", id="2**32"),
    ],
)
def test_damaged_idx_file_is_rejected_in_one_line(change, message, suffix, tmp_path, mnist):
    content = change(idx_bytes(mnist.test.pixels[:9, ..., 0]))
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    check_rejected(path, message)


def test_two_training_files_in_one_folder_are_rejected(tmp_path, mnist):
    for name in ("a-train-images-idx3-ubyte", "b-train-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(idx_bytes(mnist.test.pixels[:9, ..., 0]))
    with pytest.raises(UsageError, match=r"two files of train images, such as b-train-images-idx3-ubyte"):
        load(tmp_path)
