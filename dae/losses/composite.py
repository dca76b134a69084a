"""Weighted sums of losses: `Term`, a loss with its weight, and `CompositeLoss`, the sum of terms."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
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


# Words in the names of parameters, in singular, that tell which images they are. `input` is PyTorch's prediction beside
# a target; elsewhere it may be the noisy image, which a loss gets as keyword-only `noisy`.
_ROLES = {
    "clean": "clean target true ytrue truth gt reference ref label original orig expected real hq noiseless",
    "denoised": "denoised prediction predicted pred ypred output out yhat xhat hat estimate estimated est recon "
    "reconstruction reconstructed restored generated fake decoded result cleaned filtered recovered enhanced input",
    "noisy": "noisy corrupted degraded distorted lq input",
}


def _image_order(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return which images parameters of these names take, such as ("denoised", "clean"); None if that is unclear.

    One known name of two decides for both; two unknown ones are (clean, denoised).
    """
    words = [re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) for name in names]  # of snake_case and camelCase
    singular = [{word.lower().removesuffix("s") for word in found} for found in words]
    roles = [{role for role, known in _ROLES.items() if found & set(known.split())} for found in singular]
    if len(names) < 2:
        return ("denoised",) * len(names) if all(found == {"denoised"} for found in roles) else None
    is_clear = not any(roles) or any(len(found) == 1 for found in roles)
    for order in (("clean", "denoised"), ("denoised", "clean")) if is_clear and len(names) == 2 else ():
        if all(not found or role in found for role, found in zip(order, roles, strict=True)):
            return order
    return None


def _parameters(function: Callable) -> list[inspect.Parameter]:
    """Return the parameters of a function, or, if a decorator hides them in *args, of the function within."""
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    if hasattr(function, "__wrapped__") and any(found.kind is found.VAR_POSITIONAL for found in parameters):
        return _parameters(function.__wrapped__)
    return parameters


class ImageFunction:
    """A loss, its method `update` or a metric, called with the images and the inputs that its parameters name."""

    def __init__(self, function: Callable, prefix: str) -> None:
        """Read the parameters of `function`. Raises UsageError, with `prefix`, if they are not allowed."""
        with errors_with_line(prefix, ""):  # functions that are not written in Python may have no signature
            parameters = _parameters(getattr(function, "call", function))
        by_keyword = [found for found in parameters if found.kind is found.KEYWORD_ONLY]
        positional = [found for found in parameters if found not in by_keyword and found.kind is not found.VAR_KEYWORD]
        images = [found.name for found in positional if found.default is found.empty]
        misplaced = [found.name for found in positional if found.name in INPUTS]
        has_hidden = any(found.kind is found.VAR_POSITIONAL for found in positional)
        order = None if misplaced or has_hidden else _image_order(images)
        if order is None:
            hint = "; the names do not tell which is which" if len(images) == 2 else ""
            if misplaced:
                hint = f"; write * before {misplaced[0]}, because further inputs are keyword-only"
            raise UsageError(
                f"{prefix}: expected (clean, denoised), (denoised) or no positional parameters, got "
                f"({', '.join(str(found).split(':')[0].split('=')[0] for found in positional)}){hint}"
            )
        for name in (found.name for found in by_keyword if found.default is found.empty and found.name not in INPUTS):
            raise UsageError(f"{prefix}: unknown input {name!r}{suggestion(name, INPUTS)} (known: {', '.join(INPUTS)})")
        self.function, self.prefix, self.images = function, prefix, order
        self.inputs = [found.name for found in by_keyword if found.name in INPUTS]

    def __call__(self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any] | None = None) -> Any:
        """Return the function's value. Images are passed by position, since a decorated function may rename them."""
        images, given = {"clean": clean, "denoised": denoised}, inputs or {}
        return self.function(*(images[role] for role in self.images), **{name: given[name] for name in self.inputs})


class Term:
    """A loss in a sum: a function, or a Keras layer, which can have weights and a method `update` that trains them.

    Its value for (clean, denoised, inputs) is the loss of each image, float32 [batch], without the weight.
    """

    def __init__(self, weight: float, name: str, function: Loss, source: str, is_regularization: bool = False) -> None:
        """Describe a loss; `source` is its file and function. Raises UsageError if its parameters are not allowed."""
        self.weight, self.name, self.function, self.source = weight, name, function, source
        self.is_regularization = is_regularization
        self.layer: keras.Layer | None = function if isinstance(function, keras.Layer) else None
        self.call = ImageFunction(function, f"--loss: {source}")
        self.update = ImageFunction(function.update, f"--loss: {source}") if hasattr(function, "update") else None
        self.sees_clean = "clean" in self.call.images
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
        values = [term.call(clean, denoised, inputs) for term in self.terms]
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
