"""The state of a run on disk: the newest few checkpoints, and the best one by validation loss."""

import sys
from pathlib import Path

import keras
import tensorflow as tf

from dae.errors import RunError

NEWEST_KEPT = 3


class Checkpoints:
    """Saves and restores everything that changes while a run goes on; `state` holds it.

    All randomness is a function of the step, so the step is all that is saved of order and noise.
    """

    def __init__(self, folder: Path, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        # Adam's moments exist only once the optimizer is built; a restore before that would lose them.
        optimizer.build(model.trainable_variables)
        self.state = tf.train.Checkpoint(
            model=model,
            optimizer=optimizer,
            # Training steps done.
            step=tf.Variable(0, dtype=tf.int64),
            # Of the present epoch: the sum of its images' losses, their number, and the seconds spent.
            loss_sum=tf.Variable(0.0, dtype=tf.float64),
            images=tf.Variable(0, dtype=tf.int64),
            seconds=tf.Variable(0.0, dtype=tf.float64),
            # The least validation loss so far, and the epoch (from 1) that had it.
            best_loss=tf.Variable(float("inf"), dtype=tf.float64),
            best_epoch=tf.Variable(0, dtype=tf.int64),
        )
        self._newest = tf.train.CheckpointManager(self.state, folder / "newest", NEWEST_KEPT)
        self._best = tf.train.CheckpointManager(self.state, folder / "best", 1)

    def save(self) -> None:
        """Saves the state as the newest."""
        self._newest.save(checkpoint_number=self.state.step)

    def end_epoch(self, epoch: int, validation_loss: float | None) -> None:
        """Saves the state at the end of `epoch`, as the newest, and as the best if `validation_loss` says so."""
        for of_one_epoch in (self.state.loss_sum, self.state.images, self.state.seconds):
            of_one_epoch.assign(tf.zeros_like(of_one_epoch))
        if validation_loss is not None and validation_loss < float(self.state.best_loss):
            self.state.best_loss.assign(validation_loss)
            self.state.best_epoch.assign(epoch)
            self._best.save(checkpoint_number=self.state.step)
        self.save()

    def restore_newest(self) -> bool:
        """Restores the newest good checkpoint and names each broken one that it passes over; False if none was saved.

        Raises RunError where some were saved, but none is good.
        """
        return self._restore(self._newest)

    def restore_best(self) -> None:
        """Restores the best checkpoint; raises RunError if it is not there or not good."""
        if not self._restore(self._best):
            raise RunError(f"{self._best.directory} holds no checkpoint")

    def _restore(self, manager: tf.train.CheckpointManager) -> bool:
        # The folder is read, not the manager's own list: that may name what a kill left behind or took away.
        prefixes = [path.with_suffix("") for path in Path(manager.directory).glob("ckpt-*.index")]
        prefixes.sort(key=lambda prefix: int(prefix.name.partition("-")[2]), reverse=True)
        for prefix in prefixes:
            try:
                self.state.restore(str(prefix)).assert_consumed()
                return True
            except (tf.errors.OpError, ValueError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                print(f"warning: checkpoint {prefix} is broken and passed over ({reason})", file=sys.stderr)
        if prefixes:
            raise RunError(f"none of the checkpoints in {manager.directory} can be read")
        return False
