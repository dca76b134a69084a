"""The state of a run on disk: the newest few checkpoints, and the best one by validation loss."""

import shutil
import sys
import time
from pathlib import Path

import keras
import tensorflow as tf

from dae.errors import RunError, first_line

NEWEST_KEPT = 3


class Checkpoints:
    """Saves and restores everything that changes while a run goes on; `state` holds it.

    All randomness is a function of the step, so the step is all that is saved of order and noise.
    """

    def __init__(
        self, folder: Path, model: keras.Model, optimizer: keras.optimizers.Optimizer, losses: int = 1
    ) -> None:
        # Adam's moments exist only once the optimizer is built; a restore before that would lose them.
        optimizer.build(model.trainable_variables)
        self.state = tf.train.Checkpoint(
            model=model,
            optimizer=optimizer,
            # Training steps done.
            step=tf.Variable(0, dtype=tf.int64),
            # Of the present epoch: the sums of its images' losses (the whole, then its terms if several), the number
            # of these images, the sum of its steps' gradient norms, and the seconds spent.
            loss_sums=tf.Variable(tf.zeros([losses], tf.float64)),
            images=tf.Variable(0, dtype=tf.int64),
            gradient_norms=tf.Variable(0.0, dtype=tf.float64),
            seconds=tf.Variable(0.0, dtype=tf.float64),
            # The least validation loss so far, and the epoch (from 1) that had it.
            best_loss=tf.Variable(float("inf"), dtype=tf.float64),
            best_epoch=tf.Variable(0, dtype=tf.int64),
        )
        self._newest = self._manager(folder / "newest", NEWEST_KEPT)
        self._best = self._manager(folder / "best", 1)
        self.start_clock()

    def start_clock(self) -> None:
        """Counts the seconds of the present epoch from now on."""
        self._counted_until = time.monotonic()

    def count_seconds(self) -> float:
        """The seconds spent on the present epoch, by this process and those before it."""
        now = time.monotonic()
        self.state.seconds.assign_add(now - self._counted_until)
        self._counted_until = now
        return float(self.state.seconds)

    def save(self) -> None:
        """Saves the state as the newest."""
        self.count_seconds()
        self._newest.save(checkpoint_number=self.state.step)

    def end_epoch(self, epoch: int, validation_loss: float | None) -> None:
        """Saves the state at the end of `epoch`, as the newest, and as the best if `validation_loss` says so."""
        state = self.state
        for of_one_epoch in (state.loss_sums, state.images, state.gradient_norms, state.seconds):
            of_one_epoch.assign(tf.zeros_like(of_one_epoch))
        if validation_loss is not None and validation_loss < float(self.state.best_loss):
            self.state.best_loss.assign(validation_loss)
            self.state.best_epoch.assign(epoch)
            self._best.save(checkpoint_number=self.state.step)
        self.save()

    def restore_newest(self) -> bool:
        """Restores the newest good checkpoint, naming each broken one that it passes over; False if none was saved.

        Raises RunError where some were saved, but none is good.
        """
        restored = self._restore(self._newest)
        if not restored and saved_in(Path(self._newest.directory)):
            raise RunError(f"none of the checkpoints in {self._newest.directory} can be read")
        return restored

    def restore_best(self) -> None:
        """Restores the best checkpoint; warns, and restores the newest, where it is not there or not good."""
        if not self._restore(self._best):
            print(f"warning: {self._best.directory} holds no good checkpoint; the last epoch is kept", file=sys.stderr)
            self.restore_newest()  # a broken one may have been read in part

    def _manager(self, folder: Path, kept: int) -> tf.train.CheckpointManager:
        """A manager of all checkpoints that are in `folder`, whatever its own list there says.

        A kill may have come between a checkpoint and the list, or before a half-written one was removed.
        """
        for half_written in folder.glob("ckpt-*_temp*"):
            shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        found = saved_in(folder)
        if found:
            tf.compat.v1.train.update_checkpoint_state(
                str(folder),
                model_checkpoint_path=str(found[-1]),
                all_model_checkpoint_paths=[str(prefix) for prefix in found],
                all_model_checkpoint_timestamps=[time.time()] * len(found),
                last_preserved_timestamp=0.0,
            )
        return tf.train.CheckpointManager(self.state, folder, kept)

    def _restore(self, manager: tf.train.CheckpointManager) -> bool:
        # TensorFlow holds every tensor it reads against its checksum, and assert_consumed says that none was missing.
        for prefix in reversed(saved_in(Path(manager.directory))):
            try:
                self.state.restore(str(prefix)).assert_consumed()
                return True
            except Exception as error:  # TensorFlow's reader raises a different one for each kind of damage
                reason = first_line(error)
                print(f"warning: checkpoint {prefix} is broken and passed over ({reason})", file=sys.stderr)
        return False


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, as TensorFlow names them, the newest last; its own list may name another place."""
    prefixes = [path.with_suffix("") for path in folder.glob("ckpt-*.index")]
    return sorted(prefixes, key=lambda prefix: int(prefix.name.partition("-")[2]))
