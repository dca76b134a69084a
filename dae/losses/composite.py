"""Weighted sums of losses: `Term`, a loss with its weight, and `CompositeLoss`, the sum of terms."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from dae import plugins
from dae.errors import UsageError, suggestion
from dae.losses import expression
from dae.losses.losses import LOSSES, Loss
from dae.plugins import errors_with_line, file_of
from dae.seeding import derive_seed, keras_seed

# The keyword-only parameters that a loss can declare, and their values, which `Objective.inputs` returns.
INPUTS = {
    "noisy": "the noisy images, float32 `[batch, H, W, C]`; they can leave [0, 1] with `--no-clip-noise`",
    "second_noisy": "a second noisy copy of the clean images, with independent noise of the same level",
    "latents": "the output of the layer `encoder` for `noisy`; float32, its first dimension is `batch`",
    "noise_level": "the noise level of each image, float32 `[batch, 1, 1, 1]`",
    "step": "the number of training steps done, an int64 scalar",
    "progress": "the fraction of the run's training steps that are done, a float32 scalar from 0 to 1",
    "seed": "a seed for TensorFlow's stateless operations, int64 `[2]`; differs between steps and between shards",
    "denoise": "the network as a function, images -> denoised images, with gradients",
    "encode": "the network's encoder as a function, images -> latents, with gradients",
    "corrupt": "the run's noise as a function, (images, seed) -> noisy images, at `noise_level`",
    "config": "the run's configuration, a `RunConfig`",
}


class _Call:
    """A loss or its method `update`, called with the images and those of INPUTS that it declares."""

    def __init__(self, function: Callable, prefix: str) -> None:
        """Read the parameters of `function`. Raises UsageError if they are not those of a loss."""
        parameters = inspect.signature(getattr(function, "call", function)).parameters.values()
        positional = [
            found for found in parameters if found.kind in (found.POSITIONAL_ONLY, found.POSITIONAL_OR_KEYWORD)
        ]
        images = [found.name for found in positional if found.default is found.empty]
        misplaced = [found.name for found in positional if found.name in INPUTS]
        if (len(images) != 2 and images not in ([], ["denoised"])) or misplaced:
            hint = f"; write * before {misplaced[0]}, because further inputs are keyword-only" if misplaced else ""
            raise UsageError(
                f"{prefix}: expected (clean, denoised), (denoised) or no positional parameters, got "
                f"({', '.join(found.name for found in positional)}){hint}"
            )
        by_keyword = [found for found in parameters if found.kind is found.KEYWORD_ONLY]
        for name in (found.name for found in by_keyword if found.default is found.empty and found.name not in INPUTS):
            raise UsageError(f"{prefix}: unknown input {name!r}{suggestion(name, INPUTS)} (known: {', '.join(INPUTS)})")
        self.function, self.images = function, len(images)  # clean and denoised ones, denoised ones, or none
        self.inputs = [found.name for found in by_keyword if found.name in INPUTS]

    def __call__(self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any]) -> Any:
        images = (clean, denoised)[2 - self.images :]
        return self.function(*images, **{name: inputs[name] for name in self.inputs})


class Term:
    """A loss in a sum: a function, or a Keras layer, which can have weights and a method `update` that trains them.

    Its value for (clean, denoised, inputs) is the loss of each image, float32 [batch], without the weight.
    """

    def __init__(self, weight: float, name: str, function: Loss, source: str, is_regularization: bool = False) -> None:
        """Describe a loss; `source` is its file and function. Raises UsageError if its parameters are not allowed."""
        self.weight, self.name, self.function, self.source = weight, name, function, source
        self.is_regularization = is_regularization
        self.layer: keras.Layer | None = function if isinstance(function, keras.Layer) else None
        self.call = _Call(function, f"--loss: {source}")
        self.update = _Call(function.update, f"--loss: {source}") if hasattr(function, "update") else None
        self.sees_clean = self.call.images == 2
        self.inputs = {*self.call.inputs, *(self.update.inputs if self.update else ())}


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """The sum of the terms of `--loss`, each multiplied by its weight."""

    terms: tuple[Term, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values: "loss", and "loss_bce" ... for each term if there are several."""
        return ("loss", *(f"loss_{term.name}" for term in self.terms if len(self.terms) > 1))

    @property
    def inputs(self) -> set[str]:
        """The names of INPUTS that any term declares."""
        return {name for term in self.terms for name in term.inputs}

    @property
    def layers(self) -> list[keras.Layer]:
        """The terms that are Keras layers, and so can have weights."""
        return [term.layer for term in self.terms if term.layer is not None]

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """Weights of terms that are trained with those of the network: of each layer without a method `update`."""
        layers = [term.layer for term in self.terms if term.layer is not None and term.update is None]
        return [variable for layer in layers for variable in layer.trainable_variables]

    def __call__(
        self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, tf.Tensor]:
        """Return a float32 [batch] for each of `names`: the sum, and the terms without their weights.

        `inputs` are those of INPUTS that the terms declare.
        """
        values = [term.call(clean, denoised, inputs or {}) for term in self.terms]
        total = tf.add_n([term.weight * value for term, value in zip(self.terms, values, strict=True)])
        return dict(zip(self.names, [total, *values], strict=False))


def with_regularization(loss: CompositeLoss, model: keras.Model) -> CompositeLoss:
    """Return `loss` plus the losses of this network's regularizers, instead of those of another one."""

    def regularization(denoised: tf.Tensor) -> tf.Tensor:
        # Losses of activities are those of the last call, the one that returned `denoised`.
        return tf.fill(tf.shape(denoised)[:1], tf.add_n(model.losses))

    terms = [term for term in loss.terms if not term.is_regularization]
    if model.losses or len(terms) < len(loss.terms):  # losses of activities exist only after a call
        terms.append(Term(1.0, "regularization", regularization, "the network's regularizers", True))
    return CompositeLoss(tuple(terms))


def has_updates(text: str) -> bool:
    """Return whether a loss of `config.loss` has a method `update`; runs the users' files, but creates no weights."""
    return any(hasattr(plugins.load(LOSSES, term.name, "--loss"), "update") for term in expression.parse(text))


def build(text: str, seed: int = 0) -> CompositeLoss:
    """Return the loss that `config.loss` describes, such as "bce + 0.1*my_losses.py:my_loss".

    Runs the users' files that it names. The initial weights of a loss are drawn from `seed`. Raises UsageError if there
    is no such loss.
    """
    parsed = expression.parse(text)
    # The names of terms must differ, also from "total", which is TensorBoard's name for the sum.
    _, *names = plugins.unique_names(["total", *(plugins.label(term.name) for term in parsed)], separator="_")
    terms = []
    for (weight, reference), name in zip(parsed, names, strict=True):
        function: Any = plugins.load(LOSSES, reference, "--loss")
        source = plugins.source(reference)
        is_class = inspect.isclass(function)
        if isinstance(function, keras.Layer) or (is_class and not issubclass(function, keras.Layer)):
            raise UsageError(f"--loss: {source}: expected a function or a subclass of keras.Layer itself")
        if is_class:
            with (
                keras_seed(derive_seed(seed, f"initial weights of loss {name}")),
                errors_with_line(f"--loss: {source}", file_of(function.__init__)),
            ):
                function = function()
        terms.append(Term(weight, name, function, source))
    return CompositeLoss(tuple(terms))
