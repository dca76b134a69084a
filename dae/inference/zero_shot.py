"""Denoising of a single image, or of a stack, by a network that is trained on it alone."""

import dataclasses
import functools
from typing import Any

import numpy as np
from tqdm import tqdm

from dae.config import PYTHON_DATA, RunConfig
from dae.data import noise_level
from dae.data.images import Images, check_sides
from dae.data.pipeline import training_batches
from dae.data.values import ValueRange
from dae.errors import Diverged, UsageError, warn
from dae.inference.denoise import PRETRAINED, Denoiser, Progress
from dae.training.calls import loop_calls
from dae.training.task import prepare
from dae.training.train_step import make_train_loop, make_train_step
from dae.workdir.model_files import load_model


class ZeroShot(Denoiser):
    """Denoises each image, or stack of images, with a pretrained network that is first trained on it alone.

    `config` has the settings of this training, such as those of the preset `zero_shot`; its loss is used for noise that
    is not white and Gaussian. The result depends only on the settings and the images.
    """

    def __init__(self, config: RunConfig, self_ensemble: bool = False, channels: int = 1) -> None:
        start = PRETRAINED / ("colour" if channels == 3 else "grey")
        self._config = dataclasses.replace(config, noisy=PYTHON_DATA, axes="NYXC", start_from=str(start))
        super().__init__(load_model(start), self_ensemble=self_ensemble)

    def of(self, channels: int) -> "ZeroShot":
        """Return the same for images with this number of channels."""
        return self if channels == self.channels else self._other

    @functools.cached_property
    def _other(self) -> "ZeroShot":
        return ZeroShot(self._config, self._self_ensemble, channels=1 if self.channels == 3 else 3)

    def adapt(self, images: np.ndarray, scale: ValueRange, progress: Progress | None, source: str) -> Progress | None:
        """Train the model on images [N, H, W, C] if they have noise; else restore the pretrained weights.

        `progress` is called with numbers of pixels, N H W in total, as the training proceeds. Raises UsageError if the
        images are too small, or the training diverges.
        """
        check_sides(*images.shape[1:3])
        config, is_noisy = self.settings(Images(images, given_range=scale), source)
        side = min(config.patch_size or 0, *images.shape[1:3])
        ends = (scale.black, scale.white)
        task = prepare(dataclasses.replace(config, patch_size=side, value_range=ends), images)
        state = task.new_state()
        train_step = make_train_step(state, task.objective(state.step), task.network, task.replicas)
        train_loop = make_train_loop(train_step, state)
        batches = iter(training_batches(task.data.train, task.config))
        pixels, done = images[..., 0].size, 0
        for epoch in range(config.epochs if is_noisy else 0):
            for num_steps, batch_size, _ in loop_calls(task, epoch * task.steps_per_epoch):
                try:
                    train_loop(batches, num_steps, batch_size)
                except Diverged:
                    raise UsageError("the training diverges; leave out --noise-level or --zero-shot") from None
                if progress is not None:
                    done, before = pixels * int(state.step) // task.total_steps, done
                    progress(done - before)
        self._model.set_weights(task.evaluated_model.get_weights())
        return None if is_noisy else progress

    def settings(self, images: Images, source: str) -> tuple[RunConfig, bool]:
        """Return the settings for the noise in the images, and whether they have any; print what was found."""
        found, level = noise_level.of_images(images), self._config.noise_level
        problems, is_noisy = found.problems(), level is not None or found.sigma > noise_level.NONE
        level = found.sigma if level is None and not problems else level
        known: dict[str, Any] = {} if level is None else {"loss": "recorrupted", "noise_level": level}
        config = dataclasses.replace(self._config, **known)
        action = f"trains with {config.loss}" if is_noisy else "denoises without training"
        say = warn if found.problems(needs_level=False) else tqdm.write
        say(f"{source}: {'; '.join([found.describe(), *problems, action])}")
        return config, is_noisy
