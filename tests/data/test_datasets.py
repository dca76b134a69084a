import dataclasses
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

from dae.config import RunConfig
from dae.data import datasets
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
    with pytest.raises(UsageError, match=r"--data: .*own.npz: its images are not those that the run was made with"):
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
BAD_FLOATS = np.ones((9, 28, 28), np.float32)
BAD_FLOATS[7, 3, 4] = np.nan

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
        (npz(x_test=GOOD, y_test=GOOD), "has the arrays x_test, y_test; needed: x_train"),
        (npz(), r"has the arrays \(none\); needed: x_train"),
        (npz(x_train=npy(np.zeros((9, 28, 28), np.int64)), x_test=GOOD), "x_train is int64, not uint8"),
        (npz(x_train=npy(np.full((9, 28, 28), 255.0)), x_test=GOOD), "x_train has 255 in image 1; floats are to be"),
        (npz(x_train=npy(BAD_FLOATS), x_test=GOOD), "x_train has nan in image 8; floats are to be from 0 to 1"),
        (npz(x_train=npy(-BAD_FLOATS[:3]), x_test=GOOD), "x_train has -1 in image 1"),
        (npz(x_train=npy(np.zeros((9, 784), np.uint8)), x_test=GOOD), r"x_train has shape \(9, 784\)"),
        (npz(x_train=npy(np.zeros((0, 28, 28), np.uint8)), x_test=GOOD), r"x_train has shape \(0, 28, 28\)"),
        (npz(x_train=npy(np.zeros((9, 28, 28, 2), np.uint8)), x_test=GOOD), "C 1 or 3"),
        (npz(x_train=npy(np.zeros((9, 10, 28), np.uint8)), x_test=GOOD), "SSIM needs that"),
        (npz(x_train=header((-9, -28, 28)) + b"12", x_test=GOOD), "N from 1"),
        (npz(x_train=npy(np.zeros((9000, 28, 28), np.uint8)), x_test=GOOD), "packed more than 200-fold"),
        (npz(x_train=b"\x93NUMPY\x03\x00" + GOOD[8:], x_test=GOOD), r"format \(3, 0\), not 1.0 or 2.0"),
        (npz(x_train=GOOD.replace(b"{'descr'", b"{{'descr"), x_test=GOOD), "not a readable .npz file"),
        (npz(x_train=npy(np.zeros((9, 28, 20), np.uint8)), x_test=GOOD), "has training images of"),
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


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        datasets.load(RunConfig(data=str(tmp_path / "none.npz")))
    (tmp_path / "picture.tiff").write_text("")
    with pytest.raises(UsageError, match=r"picture.tiff: not an .npz, .npy or IDX file"):
        datasets.load(RunConfig(data=str(tmp_path / "picture.tiff")))
    with pytest.raises(UsageError, match="holds no pictures"):
        datasets.load(RunConfig(data=str(tmp_path)))


def test_floats_in_0_to_1_are_taken_for_grey_levels_and_said(tmp_path, mnist):
    digits = mnist.test[:20]
    for dtype in (np.float16, np.float32, np.float64):
        np.savez(tmp_path / "own.npz", x_train=(digits / 255).astype(dtype), x_test=np.asfortranarray(digits))
        splits = datasets.load(RunConfig(data=str(tmp_path / "own.npz"), validation_examples=0, batch_size=4))
        np.testing.assert_array_equal(splits.train, digits)
        np.testing.assert_array_equal(splits.test, digits)
        assert splits.notes == (f"x_train is {np.dtype(dtype)} in [0, 1]; rounded to 256 steps of grey",)


def test_whole_numbers_of_0_and_1_are_taken_as_they_are_and_said(tmp_path, mnist):
    np.save(tmp_path / "own.npy", mnist.test[:20] // 255)
    assert "nothing above 1 of 255" in " ".join(datasets.load(RunConfig(data=str(tmp_path / "own.npy"))).notes)


def test_a_set_without_a_test_part_gets_one_that_no_seed_changes(tmp_path, mnist):
    digits = mnist.test[:300]
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
        assert splits.notes == ("no test part: 30 of 300 images, drawn by a fixed seed, make one",)
    found = sorted(image.tobytes() for part in (splits.train, splits.validation, splits.test) for image in part)
    assert found == sorted(image.tobytes() for image in digits)


def test_small_sets_are_split_sensibly_or_refused(tmp_path, mnist):
    for count, sizes in ((2, (1, 0, 1)), (9, (8, 0, 1)), (12, (10, 1, 1))):
        np.save(tmp_path / "own.npy", mnist.test[:count])
        splits = datasets.load(RunConfig(data=str(tmp_path / "own.npy")))
        assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
        assert splits.notes[-1] == f"--batch-size 128 is more than the {sizes[0]} training images: each step has all"
    np.save(tmp_path / "own.npy", mnist.test[:1])
    with pytest.raises(UsageError, match="holds one image; needed are two"):
        datasets.load(RunConfig(data=str(tmp_path / "own.npy")))


def idx(images: np.ndarray) -> bytes:
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + images.tobytes()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-test-images-idx3-ubyte"),
    ],
)
def test_a_folder_of_idx_files_is_read(train, test, tmp_path, mnist):
    for name, images in ((train, mnist.train[:30, ..., 0]), (test, mnist.test[:9, ..., 0])):
        content = idx(images)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"labels are not looked at")
    splits = datasets.load(RunConfig(data=str(tmp_path), batch_size=8))
    np.testing.assert_array_equal(splits.train, mnist.train[:27])
    np.testing.assert_array_equal(splits.validation, mnist.train[27:30])
    np.testing.assert_array_equal(splits.test, mnist.test[:9])
    assert splits.notes == ()


def test_an_idx_file_alone_has_its_test_part_split_off(tmp_path, mnist):
    path = tmp_path / "train-images-idx4-ubyte"
    path.write_bytes(idx(np.repeat(mnist.test[:20], 3, axis=-1)))
    for data in (path, tmp_path):
        splits = datasets.load(RunConfig(data=str(data)))
        assert (splits.image_shape, len(splits.train), len(splits.test)) == ((28, 28, 3), 17, 2)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[:-1],
            "not a readable IDX file .ends within image 9 of 9|holds another number of bytes",
        ),
        (lambda content: content + b"x", "holds more than 9 images|holds another number of bytes"),
        (lambda content: content[:7], "not a readable IDX file"),
        (lambda content: b"", "not a readable IDX file"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "is no IDX file of images"),
        (lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:], "another number of bytes|more than 200-fold"),
        (lambda content: content[:4] + bytes(4) + content[8:], "with N from 1"),
    ],
)
def test_a_broken_idx_file_is_refused_in_one_line(change, message, suffix, tmp_path, mnist):
    content = change(idx(mnist.test[:9, ..., 0]))
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UsageError, match=message) as caught:
        datasets.load(RunConfig(data=str(tmp_path)))
    assert str(caught.value).startswith(f"--data: {path}: ")
    assert "\n" not in str(caught.value)


def test_two_training_files_in_one_folder_are_refused(tmp_path, mnist):
    for name in ("a-train-images-idx3-ubyte", "b-train-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(idx(mnist.test[:9, ..., 0]))
    with pytest.raises(UsageError, match=r"has a-train-images-idx3-ubyte and b-train-.* put aside all but one"):
        datasets.load(RunConfig(data=str(tmp_path)))


def test_what_is_for_pictures_is_refused_of_other_images():
    with pytest.raises(UsageError, match="--image-size: is for a folder of pictures"):
        datasets.load(RunConfig(image_size=32))


# In a process of its own, since Keras reads KERAS_HOME when it is imported.
LOAD_BOTH = """
from dae import RunConfig
from dae import UsageError
from dae.data import datasets
for name in datasets.KERAS_FILES:
    try:
        print("loaded:", name, datasets.load(RunConfig(dataset=name)).train.shape)
    except UsageError as error:
        print("refused:", error)
"""


def test_what_keras_has_on_disk_is_read_and_else_it_is_said_what_to_put_where(tmp_path, mnist):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, images in (("train", mnist.train[:40]), ("t10k", mnist.test[:10])):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[..., 0])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + len(images))))
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:1"}  # no network
    command = [sys.executable, "-c", LOAD_BOTH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith(("loaded: ", "refused: "))]
    assert said[0] == "loaded: fashion_mnist (36, 28, 28, 1)", done.stderr
    assert said[1].startswith("refused: --dataset cifar10: Keras could not download or read it (")
    assert said[1].endswith(f"put {datasets.KERAS_FILES['cifar10'].format(tmp_path / 'datasets')}")
