"""What a run minimizes: its loss, with the further inputs that the terms declare as keyword-only parameters."""

import dataclasses
from typing import Any

import tensorflow as tf

from dae.config import RunConfig
from dae.data.noise import Noise
from dae.data.pipeline import Batch, corruption
from dae.losses.composite import CompositeLoss
from dae.losses.losses import bce
from dae.models.fused_layers import Network, Outputs


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run, with all that its terms may ask for."""

    loss: CompositeLoss
    config: RunConfig
    total_steps: int
    """Training steps of the whole run."""
    step: tf.Variable
    """Training steps done, an int64 scalar."""
    corrupt: Noise = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # Here, and not in a graph, because a user's noise is read from its file.
        object.__setattr__(self, "corrupt", corruption(self.config))

    def __call__(self, network: Network, batch: Batch) -> tuple[Outputs, dict[str, tf.Tensor]]:
        """Return the outputs of `network` for a batch, and the values of the loss, as `CompositeLoss` does."""
        outputs = network(batch.noisy)
        return outputs, self.loss(batch.clean, outputs.denoised, self.inputs(network, batch, outputs))

    def update(self, network: Network, batch: Batch, outputs: Outputs) -> None:
        """Call the method `update` of each term that has one, with a batch and the network's outputs for it."""
        inputs = self.inputs(network, batch, outputs)
        for term in self.loss.terms:
            term.update(batch.clean, outputs.denoised, inputs)

    @property
    def starts_as_bce(self) -> bool:
        """Whether `bce_steps` of the configuration has an effect.

        Weights of a finished run have learned already. A loss that never sees the clean images is minimized from the
        first step, because bce would show it these.
        """
        supervised = [term.function for term in self.loss.terms if term.sees_clean]
        others = [term for term in self.loss.terms if not term.sees_clean and not term.is_regularization]
        starts_anew = self.config.bce_steps > 0 and self.config.start_from is None
        return starts_anew and bool(supervised) and (supervised != [bce] or bool(others))

    @property
    def bce_share(self) -> tf.Tensor:
        """The weight of bce in the next step, a float32 scalar that falls linearly from 1 to 0 in `bce_steps` steps."""
        return tf.maximum(1 - tf.cast(self.step / max(self.config.bce_steps, 1), tf.float32), 0)

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
