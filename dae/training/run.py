"""What the loop and what comes after it share."""

import dataclasses
import functools
from pathlib import Path

import keras
import numpy as np

from dae.config import RunConfig
from dae.data.datasets import Splits
from dae.data.pipeline import Batch, first_evaluation_batch, steps_per_epoch
from dae.evaluation.metrics import Evaluate
from dae.losses.losses import WeightedSum
from dae.reporting.console import Progress
from dae.training.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is going on: what it is made of, where it writes and how it speaks."""

    config: RunConfig
    folder: Path
    splits: Splits
    model: keras.Model
    loss: WeightedSum
    evaluate: Evaluate
    checkpoints: Checkpoints
    progress: Progress

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch."""
        return steps_per_epoch(len(self.splits.train), self.config.batch_size)

    @functools.cached_property
    def examples(self) -> Batch:
        """The first (noisy, clean) validation images, or training images where none validates, for TensorBoard."""
        images = self.splits.validation if self.config.validation_examples else self.splits.train
        return first_evaluation_batch(images, self.config, "validation")

    def returns_one_image(self) -> bool:
        """Whether the model returns nearly the same, whatever it is given: on average less than 0.005 apart."""
        denoised = self.model(self.examples[0][:20]).numpy()
        return len(denoised) > 1 and float(np.ptp(denoised, axis=0).mean()) < 0.005
