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
from helpers import TINY, new_state, run_in_process

from dae.analysis.reproducibility import first_difference
from dae.models import networks
from dae.training.checkpoints import saved_in
from dae.training.train_state import TrainState


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run`, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "copy")


def next_value(value: Any) -> np.ndarray:
    """Return `value` with its middle element moved by the smallest possible amount."""
    changed = np.array(value)
    middle = changed.reshape(-1)[changed.size // 2 :][:1]
    middle[:] = middle + 1 if changed.dtype.kind == "i" else np.nextafter(middle, np.array(np.inf, changed.dtype))
    assert not np.array_equal(changed, value)
    return changed


def change_lines(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrite metrics.jsonl with its lines as `change` leaves them."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A train state to restore checkpoints of `tiny_run` into."""
    return new_state(model=networks.build(TINY, (28, 28, 1)))


def change_checkpoint(folder: Path, state: TrainState, change: Callable[[TrainState], object]) -> None:
    """Restore the last checkpoint in `folder`, and write it again with the state as `change` leaves it."""
    prefix = str(saved_in(folder)[-1])
    state.read(prefix).assert_consumed()
    change(state)
    state.write(prefix)


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


def next_event(step: int, prefix: str) -> Callable[[Any], bool]:
    """Return the change of events that moves the tensors of a step by the smallest possible amount."""

    def change(event: Any) -> bool:
        for value in event.summary.value:
            if event.step == step and value.tag.startswith(prefix):
                value.tensor.CopyFrom(tf.make_tensor_proto(next_value(tf.make_ndarray(value.tensor))))
        return True

    return change


def test_a_copy_and_rewriting_without_a_change_are_no_difference(state, tiny_run, copy):
    """So that a difference in the tests below comes from the change that they make."""
    assert first_difference(tiny_run, copy) is None
    for name in ("latest", "best"):
        change_checkpoint(copy / "checkpoints" / name, state, lambda state: None)
    for name in ("train", "validation", "test"):
        change_events(copy / "tensorboard" / name, lambda event: True)
    assert first_difference(tiny_run, copy) is None


def change_report(folder: Path, name: str) -> None:
    """Move a value of the report by the smallest possible amount."""
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {name: next_value(report[name]).item()}))


def change_pixel(file: Path) -> None:
    """Change the last bit of a pixel."""
    pixels = tf.io.decode_png(file.read_bytes()).numpy()
    pixels[0, 0, 0] ^= 1
    file.write_bytes(tf.io.encode_png(pixels).numpy())


def next_metric(epoch: int, name: str) -> Callable[[Path], None]:
    """Return the change of a metric by the smallest possible amount."""
    return lambda run: change_lines(
        run, lambda lines: lines[epoch - 1].update({name: next_value(lines[epoch - 1][name]).item()})
    )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (next_metric(1, "step"), "metrics.jsonl, epoch 1: step is "),
        (next_metric(2, "validation_mse"), "metrics.jsonl, epoch 2: validation_mse is "),
        (lambda run: change_lines(run, lambda lines: lines[1].pop("train_loss")), "epoch 2: train_loss"),
        (lambda run: change_lines(run, lambda lines: lines.pop()), "metrics.jsonl, epoch 3"),
        (lambda run: change_lines(run, lambda lines: lines[0].update(train_loss=math.nan)), "epoch 1: train_loss"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "best"), "checkpoints/best"),
        (lambda run: change_pixel(run / "denoised.png"), "denoised.png"),
        (lambda run: change_pixel(run / "curves.png"), "curves.png"),
        (lambda run: change_report(run, "test_ssim"), "report.json: test_ssim is "),
        *(
            (
                lambda run, writer=writer, step=step, tag=tag: change_events(
                    run / "tensorboard" / writer, next_event(step, tag)
                ),
                f"tensorboard/{writer}, step {step}: {tag}",
            )
            for writer, step, tag in (("train", 1, "loss/total"), ("test", 3, "quality/"), ("train", 2, "weights/"))
        ),
        (lambda run: change_events(run / "tensorboard" / "test", lambda event: event.step != 3), "/test, step 3: "),
    ],
)
def test_a_change_is_found_in_both_directions(change, difference, tiny_run, copy):
    change(copy)
    for found in (first_difference(tiny_run, copy), first_difference(copy, tiny_run)):
        assert found is not None
        assert difference in found
    assert first_difference(copy, copy) is None  # NaN equals NaN


@pytest.mark.parametrize(
    ("folder", "name", "select"),
    [
        ("latest", "optimizer/velocity", lambda state: state.optimizer.velocity),
        ("best", "trainable_variables/13", lambda state: state.model.trainable_variables[13]),
        ("latest", "means/sums", lambda state: state.means.sums),
        ("best", "best_value", lambda state: state.best_value),
    ],
)
def test_changed_tensor_of_a_checkpoint_is_found(name, select, folder, state, tiny_run, copy):
    change_checkpoint(
        copy / "checkpoints" / folder, state, lambda state: select(state).assign(next_value(select(state)))
    )
    difference = first_difference(tiny_run, copy)
    assert difference is not None
    assert f"checkpoints/{folder}: " in difference
    assert name in difference


def test_sign_of_zero_is_found(copy):
    change_lines(copy, lambda lines: lines[0].update(train_loss=-0.0))
    zero = shutil.copytree(copy, copy.with_name("zero"))
    change_lines(zero, lambda lines: lines[0].update(train_loss=0.0))
    assert first_difference(zero, copy) == "metrics.jsonl, epoch 1: train_loss is 0.0 and -0.0"


def test_event_that_was_written_twice_is_an_error(tiny_run, copy):
    (file,) = (copy / "tensorboard" / "train").glob("events.out.tfevents.*")
    shutil.copy(file, file.with_name(f"{file.name}.again"))
    with pytest.raises(ValueError, match="two values"):
        first_difference(tiny_run, copy)


def test_durations_are_ignored(state, tiny_run, copy):
    change_lines(copy, lambda lines: [line.update(seconds=1.0, images_per_second=1.0) for line in lines])
    for name in ("latest", "best"):
        change_checkpoint(copy / "checkpoints" / name, state, lambda state: state.seconds.assign_add(1.0))
    change_events(copy / "tensorboard" / "train", next_event(2, "speed/images_per_second"))
    assert first_difference(tiny_run, copy) is None


@pytest.mark.slow
def test_verify_reports_the_first_difference_from_a_rerun(finished_run, tmp_path):
    run = shutil.copytree(finished_run("plain"), tmp_path / "run")
    change_lines(run, lambda lines: lines[1].update(validation_mse=0.5))
    completed = run_in_process("verify.py", run, status=1)
    assert "metrics.jsonl, epoch 2: validation_mse" in completed.stderr
    assert "identical" not in completed.stdout


def test_of_a_run_without_its_checkpoints_what_is_left_is_compared(copy, tiny_run):
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(copy / name)
    (copy / "curves.png").unlink()
    assert first_difference(copy, tiny_run) is None
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"weights_sha256": "0" * 64}))
    difference = first_difference(copy, tiny_run)
    assert difference is not None
    assert difference.startswith("report.json: weights_sha256 is ")
