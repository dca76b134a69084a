"""The comparison behind all tests of exactness finds every kind of difference, but none between durations."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import new_state, run_in_process, run_subprocess

from dae.analysis.reproducibility import first_difference
from dae.training.checkpoints import saved_in
from dae.training.train_state import TrainState


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run`, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "copy")


def next_float(value: Any) -> np.ndarray:
    """Return the next larger number of the same type; the smallest possible change."""
    value = np.asarray(value)
    return np.nextafter(value, np.array(np.inf, value.dtype))


def change_lines(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrite metrics.jsonl with its lines as `change` leaves them."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A train state to restore checkpoints of `tiny_run` into."""
    return new_state()


def change_checkpoint(folder: Path, state: TrainState, change: Callable[[TrainState], object]) -> None:
    """Restore the last checkpoint in `folder`, and write it again with the state as `change` leaves it."""
    prefix = str(saved_in(folder)[-1])
    state.read(prefix).assert_consumed()
    change(state)
    state.write(prefix)


def change_element(variable: tf.Variable) -> None:
    """Move the middle element of `variable` by the smallest possible amount."""
    values = np.array(variable)
    values.flat[values.size // 2] += 1 if values.dtype.kind == "i" else 0
    if values.dtype.kind == "f":
        values.flat[values.size // 2] = next_float(values.flat[values.size // 2])
    assert not np.array_equal(values, variable)
    variable.assign(values)


def set_tensor(proto: Any, values: np.ndarray) -> None:
    """Store `values` in a TensorProto in the form that it has already, since first_difference compares bytes."""
    if proto.tensor_content:
        proto.tensor_content = values.tobytes()
    else:
        field = proto.string_val if proto.string_val else proto.float_val
        field[:] = values.ravel().tolist()


def change_events(folder: Path, change: Callable[[Any], bool]) -> None:
    """Rewrite the event file in `folder` with the events for which `change` is true, as it leaves them."""
    (file,) = folder.glob("events.out.tfevents.*")
    events = [
        tf.compat.v1.Event.FromString(record) for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    ]
    with tf.io.TFRecordWriter(str(file)) as writer:
        for event in events:
            if change(event):
                writer.write(event.SerializeToString())


def change_scalar(step: int, tag: str, replace: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], bool]:
    """Return the change of events that replaces one value."""

    def change(event: Any) -> bool:
        for value in event.summary.value:
            if (event.step, value.tag) == (step, tag):
                set_tensor(value.tensor, replace(tf.make_ndarray(value.tensor)))
        return True

    return change


def assert_difference(run: Path, other: Path, *parts: str) -> None:
    """Assert that the difference is found in both directions, and named by all `parts`."""
    for difference in (first_difference(run, other), first_difference(other, run)):
        assert difference is not None
        for part in parts:
            assert part in difference


def test_run_equals_itself_and_its_copy(tiny_run, copy):
    assert first_difference(tiny_run, tiny_run) is None
    assert first_difference(tiny_run, copy) is None


def test_rewriting_without_a_change_is_no_difference(state, tiny_run, copy):
    """So that a difference in the tests below comes from the change that they make."""
    change_lines(copy, lambda lines: None)
    for name in ("latest", "best"):
        change_checkpoint(copy / "checkpoints" / name, state, lambda state: None)
    for name in ("train", "validation", "test"):
        change_events(copy / "tensorboard" / name, lambda event: True)
    change_events(copy / "tensorboard" / "train", change_scalar(2, "loss/total", lambda value: value))
    assert first_difference(tiny_run, copy) is None


@pytest.mark.parametrize(
    ("name", "epoch"),
    [("step", 1), ("train_loss", 1), ("validation_mse", 2), ("learning_rate", 3), ("gradient_norm", 3)],
)
def test_changed_metric_is_found(name, epoch, tiny_run, copy):
    def change(lines: list[dict[str, Any]]) -> None:
        value = lines[epoch - 1][name]
        lines[epoch - 1][name] = value + 1 if isinstance(value, int) else float(next_float(value))

    change_lines(copy, change)
    assert_difference(tiny_run, copy, "metrics.jsonl", f"epoch {epoch}", name)


def test_sign_of_zero_is_found_and_nan_equals_nan(state, tiny_run, copy):
    change_lines(copy, lambda lines: lines[0].update(train_loss=math.nan))
    assert first_difference(copy, copy) is None
    assert_difference(tiny_run, copy, "train_loss")

    folder = copy / "checkpoints" / "latest"
    zero, negative_zero = (copy.with_name(name) for name in ("zero", "negative zero"))
    for other, value in ((zero, 0.0), (negative_zero, -0.0)):

        def set_momentum(state: TrainState, value: float = value) -> None:
            state.optimizer.momentum.assign(np.full(state.optimizer.momentum.shape, value, np.float32))

        change_checkpoint(folder, state, set_momentum)
        shutil.copytree(copy, other)
    assert_difference(zero, negative_zero, "momentum")


def test_missing_metric_is_found(tiny_run, copy):
    change_lines(copy, lambda lines: lines[1].pop("validation_psnr"))
    assert_difference(tiny_run, copy, "metrics.jsonl", "epoch 2", "validation_psnr")


def test_fewer_epochs_are_found(tiny_run, copy):
    change_lines(copy, lambda lines: lines.pop())
    assert_difference(tiny_run, copy, "metrics.jsonl", "3", "2", "epochs")


@pytest.mark.parametrize("index", [0, 7, 13])
def test_changed_element_of_a_weight_is_found(index, state, tiny_run, copy):
    weight = state.model.trainable_variables[index]
    change_checkpoint(copy / "checkpoints" / "latest", state, lambda state: change_element(weight))
    assert_difference(tiny_run, copy, "checkpoints/latest", f"trainable_variables/{index}/")


@pytest.mark.parametrize("folder", ["latest", "best"])
@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("optimizer/momentum", lambda state: state.optimizer.momentum),
        ("optimizer/velocity", lambda state: state.optimizer.velocity),
        ("optimizer/_iterations", lambda state: state.optimizer.iterations),
        ("trainable_variables/13", lambda state: state.model.trainable_variables[13]),
        ("step", lambda state: state.step),
        ("means/sums", lambda state: state.means.sums),
        ("means/images", lambda state: state.means.images),
        ("best_loss", lambda state: state.best_loss),
        ("best_epoch", lambda state: state.best_epoch),
    ],
)
def test_changed_tensor_of_a_checkpoint_is_found(name, select, folder, state, tiny_run, copy):
    change_checkpoint(copy / "checkpoints" / folder, state, lambda state: change_element(select(state)))
    assert_difference(tiny_run, copy, f"checkpoints/{folder}", name)


@pytest.mark.parametrize("folder", ["latest", "best"])
def test_missing_checkpoint_is_found(folder, tiny_run, copy):
    shutil.rmtree(copy / "checkpoints" / folder)
    assert_difference(tiny_run, copy, f"checkpoints/{folder}")


def test_earlier_checkpoint_in_place_of_the_last_is_found(tiny_run, copy):
    for file in (copy / "checkpoints" / "latest").glob("ckpt-30.*"):
        file.unlink()
    assert_difference(tiny_run, copy, "checkpoints/latest")


@pytest.mark.parametrize(
    ("writer", "step", "tag"),
    [("train", 1, "loss/total"), ("validation", 3, "quality/ssim"), ("test", 3, "quality/psnr")],
)
def test_changed_scalar_of_tensorboard_is_found(writer, step, tag, tiny_run, copy):
    change_events(copy / "tensorboard" / writer, change_scalar(step, tag, next_float))
    assert_difference(tiny_run, copy, f"tensorboard/{writer}", f"step {step}", tag)


@pytest.mark.parametrize(
    ("writer", "prefix"),
    [("train", "weights/"), ("validation", "latents/encoder"), ("validation", "images/")],
)
def test_changed_tensor_of_tensorboard_is_found(writer, prefix, tiny_run, copy):
    def change(event: Any) -> bool:
        for value in event.summary.value:
            if event.step == 2 and value.tag.startswith(prefix):
                content = tf.make_ndarray(value.tensor).copy()
                if content.dtype.kind == "f":
                    content.flat[-1] = next_float(content.flat[-1])
                else:  # the width, the height, and the PNG
                    content[-1] = content[-1][:-1] + bytes([content[-1][-1] ^ 1])
                set_tensor(value.tensor, content)
        return True

    change_events(copy / "tensorboard" / writer, change)
    assert_difference(tiny_run, copy, f"tensorboard/{writer}", "step 2", prefix)


@pytest.mark.parametrize("writer", ["train", "validation", "test"])
def test_missing_event_is_found(writer, tiny_run, copy):
    change_events(
        copy / "tensorboard" / writer,
        lambda event: not (event.step == 3 and any(value.tag == "quality/bce" for value in event.summary.value)),
    )
    assert_difference(tiny_run, copy, f"tensorboard/{writer}")
    difference = first_difference(tiny_run, copy)
    assert difference is not None
    assert "step 3" in difference
    assert "quality/bce" in difference


def test_event_written_twice_is_an_error(tiny_run, copy):
    (file,) = (copy / "tensorboard" / "train").glob("events.out.tfevents.*")
    shutil.copy(file, file.with_name(f"{file.name}.again"))
    with pytest.raises(ValueError, match="two values"):
        first_difference(tiny_run, copy)


@pytest.mark.parametrize("name", ["denoised.png", "curves.png"])
def test_changed_pixel_is_found(name, tiny_run, copy):
    pixels = tf.io.decode_png((copy / name).read_bytes()).numpy()
    before = pixels.copy()
    pixels[0, 0, 0] ^= 1
    (copy / name).write_bytes(tf.io.encode_png(pixels).numpy())
    assert (tf.io.decode_png((copy / name).read_bytes()).numpy() != before).sum() == 1
    assert_difference(tiny_run, copy, name)


@pytest.mark.parametrize("name", ["epoch", "parameters", "test_loss", "test_ssim"])
def test_changed_value_of_the_report_is_found(name, tiny_run, copy):
    report = json.loads((copy / "report.json").read_text())
    report[name] = report[name] + 1 if isinstance(report[name], int) else float(next_float(report[name]))
    (copy / "report.json").write_text(json.dumps(report))
    assert_difference(tiny_run, copy, "report.json", name)


def test_durations_are_ignored(state, tiny_run, copy):
    def change(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["seconds"] += 1.0
            line["images_per_second"] += 1.0

    change_lines(copy, change)
    for name in ("latest", "best"):
        change_checkpoint(copy / "checkpoints" / name, state, lambda state: state.seconds.assign_add(1.0))
    changed = change_scalar(2, "speed/images_per_second", lambda value: value + 1)
    change_events(copy / "tensorboard" / "train", changed)
    assert first_difference(tiny_run, copy) is None


@pytest.mark.slow
def test_verify_reports_an_identical_rerun(tiny_run):
    completed = run_subprocess("verify.py", tiny_run)
    assert completed.returncode == 0, completed.stderr
    assert "identical" in completed.stdout


@pytest.mark.slow
def test_verify_reports_the_first_difference(state, copy):
    change_checkpoint(copy / "checkpoints" / "latest", state, lambda state: change_element(state.optimizer.velocity))
    change_lines(copy, lambda lines: lines[1].update(validation_mse=float(next_float(lines[1]["validation_mse"]))))
    completed = run_in_process("verify.py", copy)
    assert completed.returncode == 1
    for part in ("metrics.jsonl", "epoch 2", "validation_mse"):
        assert part in completed.stderr
    assert "identical" not in completed.stdout


def test_verify_refuses_an_unfinished_run(copy):
    (copy / "report.json").unlink()
    completed = run_in_process("verify.py", copy)
    assert completed.returncode == 2
    assert "not a finished run" in completed.stderr
