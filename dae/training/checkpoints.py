"""Checkpoints of the train state: the latest few, and the best one, with the lowest value of `Task.criterion`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from dae import config as config_module
from dae import resolved
from dae.errors import RunError, UsageError, first_line, warn
from dae.models import networks
from dae.replicas import ALONE, Replicas
from dae.training.train_state import TrainState
from dae.training.workers import check_states
from dae.workdir.workdir import CONFIG

LATEST_KEPT = 3


class Checkpoints:
    """Saves and restores a train state in a folder.

    Not a `tf.train.CheckpointManager`: it believes its own list of checkpoints, which a kill, or moving the folder, can
    leave out of date. Here the files themselves are the list. Of several workers, the chief restores, and the others
    get the state from it.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        replicas: Replicas = ALONE,
        steps_per_epoch: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Save to and restore from `folder`; `check` is called before each checkpoint is written."""
        self._steps_per_epoch, self._check = steps_per_epoch, check
        self._latest, self._best, self._state = folder / "latest", folder / "best", state
        self._replicas = replicas

    def save(self) -> None:
        """Save the state as the latest checkpoint."""
        self._save(self._latest, LATEST_KEPT)

    def save_epoch(self, epoch: int, value: float | None) -> None:
        """Save the state at the end of `epoch` as the latest checkpoint, and as the best if its `value` is the lowest.

        It is that of `Task.criterion`, or None if nothing validates.
        Raises RunError, and saves nothing, if the states of several workers differ.
        """
        check_states(self._state, self._replicas)
        if value is not None and value < float(self._state.best_value):
            self._state.best_value.assign(value)
            self._state.best_epoch.assign(epoch)
            self._save(self._best, 1)
        self.save()

    def restore_latest(self, whole_epochs: bool = False) -> None:
        """Restore the latest intact checkpoint, if there are any, and remove later ones, which will be written again.

        With `whole_epochs`, only the ends of epochs count, and UsageError is raised if there is none. Warns of each
        damaged one; raises RunError if none is intact. For the chief only; `share` must follow.
        """
        prefixes = self._epoch_ends() if whole_epochs else saved_in(self._latest)
        if whole_epochs and not prefixes:
            raise UsageError(f"--finish: {self._latest} has no checkpoint of a whole epoch; continue without --finish")
        if prefixes and not self._restore(prefixes):
            raise RunError(
                f"none of the checkpoints in {self._latest} can be read; restore the folder, or start another run"
            )
        for folder in (self._latest, self._best):
            _keep(folder, [prefix for prefix in saved_in(folder) if _step(prefix) <= int(self._state.step)])

    def restore_best(self) -> None:
        """Restore the best checkpoint; if it is missing or damaged, warn and restore the latest."""
        if self._replicas.is_chief and not self._restore(saved_in(self._best)):
            warn(f"{self._best} has no intact checkpoint; using the last epoch")
            self.restore_latest()  # the damaged one may have been restored in part
        self.share()

    def share(self) -> None:
        """Give all workers the state of the chief."""
        if self._replicas.workers == 1:
            return
        with tempfile.TemporaryDirectory() as folder:
            prefix = f"{folder}/state"
            files = [Path(f"{prefix}.{suffix}") for suffix in ("index", "data-00000-of-00001")]
            if self._replicas.is_chief:
                self._state.write(prefix)
            for file in files:
                content, *_ = self._replicas.exchange(file.read_bytes() if self._replicas.is_chief else b"")
                file.write_bytes(content)
            if not self._replicas.is_chief:
                self._state.read(prefix).assert_consumed()

    def _save(self, folder: Path, kept: int) -> None:
        self._check()
        prefix = folder / f"ckpt-{int(self._state.step)}"
        self._state.write(str(prefix))
        # With the last end of an epoch, after which the run can be finished.
        ends = self._epoch_ends()[-1:] if folder == self._latest else []
        _keep(folder, [*saved_in(folder)[-kept:], *ends])

    def _epoch_ends(self) -> list[Path]:
        return [prefix for prefix in saved_in(self._latest) if _step(prefix) % self._steps_per_epoch == 0]

    def _restore(self, prefixes: list[Path]) -> bool:
        # TensorFlow verifies the checksum of every tensor it reads, and assert_consumed that none is missing.
        for prefix in reversed(prefixes):
            try:
                self._state.read(str(prefix)).assert_consumed()
                return True
            except Exception as error:  # TensorFlow's reader raises a different type for each kind of damage
                warn(f"checkpoint {prefix} is damaged and skipped ({first_line(error)})")
        return False


def restored_model(run: Path) -> keras.Model:
    """Return the network of a run that is not finished, with the weights of its best checkpoint.

    Without validation images, or if it is damaged, they are those of its latest one. A warning names it. Raises
    UsageError if there is no checkpoint, or if none can be read.
    """
    best, latest = (saved_in(run / "checkpoints" / name) for name in ("best", "latest"))
    if not best and not latest:
        raise UsageError(f"{run}: not a finished run, and without a checkpoint; resume it first")
    config = config_module.read(run / CONFIG)
    model = networks.build(config, resolved.read(run).image_shape)
    name = "model" if config.ema_decay is None else "average"
    for prefix in (*best, *reversed(latest)):
        try:
            status = tf.train.Checkpoint(**{name: model}).read(str(prefix))
            status.assert_existing_objects_matched().expect_partial()
        except Exception as error:  # of many types, as in `Checkpoints`
            warn(f"checkpoint {prefix} is damaged and skipped ({first_line(error)})")
        else:
            warn(f"{run} is not finished: using its checkpoint {prefix}")
            return model
    raise UsageError(f"{run}: none of its checkpoints can be read; restore the folder, or start another run")


def saved_in(folder: Path) -> list[Path]:
    """Return the prefixes of the checkpoints in `folder`, the latest last. TensorFlow writes an index last."""
    return sorted((path.with_suffix("") for path in folder.glob("ckpt-*.index")), key=_step)


def _step(prefix: Path) -> int:
    return int(prefix.name.partition("-")[2])


def _keep(folder: Path, prefixes: list[Path]) -> None:
    """Remove from `folder` all checkpoints but these, and what a kill left of others."""
    names = {prefix.name for prefix in prefixes}
    for path in sorted(folder.glob("ckpt-*"), reverse=True):  # an index before its data
        if path.stem not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
