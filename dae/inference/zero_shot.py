"""Denoising of a single image, or of a stack, by a network that is trained on it alone."""

import dataclasses

import numpy as np
from tqdm import tqdm

from dae.config import PYTHON_DATA, RunConfig
from dae.data import noise_level, values
from dae.data.images import Images, check_sides
from dae.data.pipeline import training_batches
from dae.errors import warn
from dae.inference.denoise import PRETRAINED, Denoiser, Progress
from dae.training.calls import loop_calls
from dae.training.task import prepare
from dae.training.train_step import make_train_loop, make_train_step
from dae.workdir.model_files import load_model


class ZeroShot(Denoiser):
    """Denoises each image, or stack of images, with a network of its own: the package's, trained on it alone.

    `config` has the settings of this training, such as those of the preset `zero_shot`. White Gaussian noise, of
    `config.noise_level` or of the level that is found in the images, is removed with the loss `recorrupted`; other
    noise with `config.loss`. The result is a function of these and of the images.
    """

    def __init__(self, config: RunConfig, self_ensemble: bool = False, channels: int = 1) -> None:
        start = PRETRAINED / ("colour" if channels == 3 else "grey")
        self._config = dataclasses.replace(config, noisy=PYTHON_DATA, axes="NYXC", start_from=str(start))
        super().__init__(load_model(start), self_ensemble=self_ensemble)
        self._initial = self._model.get_weights()

    def of(self, channels: int) -> "ZeroShot":
        """Return the same for images with this number of channels."""
        return self if channels == self.channels else ZeroShot(self._config, self._self_ensemble, channels)

    def denoise_into(
        self,
        denoised: np.ndarray,
        images: np.ndarray,
        value_range: tuple[float, float] | None = None,
        progress: Progress | None = None,
        source: str = "",
    ) -> None:
        """Train on images [N, H, W, C], and denoise them into an array of the same shape and type.

        Prints what noise is found; if there is none, denoises them without training. `progress` is called with numbers
        of pixels, N H W in total, as the training proceeds. Raises UsageError as `Denoiser` does, and Diverged if the
        loss or its gradient is not finite.
        """
        check_sides(*images.shape[1:3])
        scale = self.value_range(images.dtype, value_range)
        values.check(images, scale)
        config = self._chosen(Images(images, given_range=scale), source) if len(images) else None
        if config is None:
            self._model.set_weights(self._initial)
            super().denoise_into(denoised, images, value_range, progress, source)
            return
        side = min(config.patch_size or 0, *images.shape[1:3])
        ends = (scale.black, scale.white)
        task = prepare(dataclasses.replace(config, patch_size=side, value_range=ends), images)
        state = task.new_state()
        train_step = make_train_step(state, task.objective(state.step), task.network, task.replicas)
        train_loop = make_train_loop(train_step, state)
        batches = iter(training_batches(task.data.train, task.config))
        pixels, done = images[..., 0].size, 0
        for epoch in range(task.config.epochs):
            for num_steps, batch_size, _ in loop_calls(task, epoch * task.steps_per_epoch):
                train_loop(batches, num_steps, batch_size)
                if progress is not None:
                    done, before = pixels * int(state.step) // task.total_steps, done
                    progress(done - before)
        self._model.set_weights(task.evaluated_model.get_weights())
        super().denoise_into(denoised, images, value_range, source=source)

    def _chosen(self, images: Images, source: str) -> RunConfig | None:
        """Return the settings for the noise that is found in the images, or None without noise; print a line on it."""
        found = noise_level.of_images(images)
        level, problems = self._config.noise_level, found.problems()
        if level is None and not problems:
            level = round(found.sigma, 5)
        config: RunConfig | None = self._config
        if level is not None:
            config = dataclasses.replace(self._config, loss="recorrupted", noise_level=level)
        elif found.sigma <= noise_level.NONE:
            config = None
        action = "denoises without training" if config is None else f"trains with the loss {config.loss}"
        line = f"{source}noise: {'; '.join([found.describe(), *problems, action])}"
        if found.problems(needs_level=False):
            warn(f"{line} (docs/data.md)")
        else:
            tqdm.write(line)
        return config
