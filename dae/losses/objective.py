"""The objective of a run: its loss, with the further inputs that the terms declare as keyword-only parameters."""

import dataclasses
import functools
from typing import Any

import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.data.noise import Noise
from dae.data.pipeline import Batch
from dae.losses.composite import CompositeLoss
from dae.losses.losses import bce
from dae.models.fused_layers import Network, Outputs, SeededNetwork


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run, with all that its terms may ask for."""

    loss: CompositeLoss
    config: RunConfig
    corrupt: Noise
    """The run's noise model, followed by clipping to [0, 1] if `config.clip_noise`."""
    total_steps: int
    """Training steps of the whole run."""
    step: tf.Variable
    """Training steps done, an int64 scalar."""
    is_bounded: bool = True
    """True if the outputs of the network are always in [0, 1], the domain of BCE."""

    def __call__(self, network: Network, batch: Batch) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Return what a train step minimizes, and the mean of each value of the loss over the images of `batch`.

        These differ only in the first `bce_steps` steps (see `warms_up`). All are float32 scalars.
        """
        with tf.name_scope("network"):
            outputs = network(batch.noisy)
        with tf.name_scope("loss"):
            values = self.loss(batch.clean, outputs.denoised, self.inputs(network, batch, outputs))
        means = {name: tf.reduce_mean(value) for name, value in values.items()}
        if not self.warms_up:
            return means["loss"], means
        mixed = functools.partial(self._mixed, means["loss"], batch.clean, outputs.denoised)
        return tf.cond(self.step < self.config.bce_steps, mixed, lambda: means["loss"]), means

    def after_step(self, network: SeededNetwork, batch: Batch) -> None:
        """Call the method `update` of each term that has one, with a batch and the updated network's outputs for it."""
        if updates := [term.update for term in self.loss.terms if term.update]:
            seeded = network(batch.seed)
            outputs = seeded(batch.noisy)
            inputs = self.inputs(seeded, batch, outputs)
            for update in updates:
                update(batch.clean, outputs.denoised, inputs)

    @property
    def warms_up(self) -> bool:
        """True if the run starts with the BCE warm-up, because many losses do not learn from random weights.

        Weights of another run are trained already. A loss that never sees the clean images is minimized from the
        first step, because BCE would show it these; and so is that of a network whose outputs are not bounded.
        """
        supervised = [term.function for term in self.loss.terms if term.sees_clean]
        others = [term for term in self.loss.terms if not term.sees_clean and not term.is_regularization]
        can_start = self.is_bounded and self.config.bce_steps > 0 and self.config.start_from is None
        return can_start and bool(supervised) and (supervised != [bce] or bool(others))

    def describe(self) -> str:
        """Return the loss, and the steps of its warm-up if there are any, for display."""
        loss = plugins.label(self.config.loss)
        return f"BCE warm-up, then {loss} from step {self.config.bce_steps}" if self.warms_up else loss

    def _mixed(self, loss: tf.Tensor, clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
        """Return the weighted mean of BCE and `loss`; the weight of BCE falls linearly from 1 to 0."""
        weight = 1 - tf.cast(self.step / self.config.bce_steps, tf.float32)
        mean_bce = tf.reduce_mean(bce(clean, denoised))
        # BCE has the scale of the loss, since after larger gradients Adam would long take smaller steps.
        scale = tf.stop_gradient(tf.math.divide_no_nan(tf.abs(loss), mean_bce))
        return weight * scale * mean_bce + (1 - weight) * loss

    def inputs(self, network: Network, batch: Batch, outputs: Outputs) -> dict[str, Any]:
        """Return the value of each of INPUTS. In a graph, those that no term asks for are not computed."""
        second = tf.random.experimental.stateless_fold_in(batch.seed, 2**31 - 1)
        return {
            "noisy": batch.noisy,
            "second_noisy": self.corrupt(batch.clean, batch.noise_level, second),
            "latents": outputs.latents,
            "noise_level": batch.noise_level,
            "step": self.step.read_value(),
            "progress": tf.cast(self.step / self.total_steps, tf.float32),
            "seed": batch.seed,
            "denoise": lambda images: network(images).denoised,
            "encode": lambda images: network(images).latents,
            "corrupt": lambda images, seed: self.corrupt(images, batch.noise_level, seed),
            "config": self.config,
        }
