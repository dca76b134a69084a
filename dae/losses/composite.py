"""`CompositeLoss`: what a run minimizes, a weighted sum of losses."""

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

# What a loss can declare as keyword-only parameters, with the meaning of each; `Objective.inputs` makes them.
INPUTS = {
    "noisy": "the noisy images, float32 `[batch, H, W, C]`; they can leave [0, 1] with `--no-clip-noise`",
    "second_noisy": "a second noisy copy of the clean images, with independent noise of the same level",
    "latents": "the output of the layer `encoder` for `noisy`; float32, its first dimension is `batch`",
    "noise_level": "the noise level of each image, float32 `[batch, 1, 1, 1]`",
    "step": "how many training steps are done, an int64 scalar",
    "progress": "the share of the run's training steps that are done, a float32 scalar from 0 to 1",
    "seed": "a seed for TensorFlow's stateless operations, int64 `[2]`; differs between steps and between shards",
    "denoise": "the network as a function, images -> denoised images, with gradients",
    "encode": "the network's encoder as a function, images -> latents, with gradients",
    "corrupt": "the run's noise as a function, (images, seed) -> noisy images, at `noise_level`",
    "config": "the run's configuration, a `RunConfig`",
}


# The source of a term that is the sum of the network's own losses.
REGULARIZATION = "the network's regularizers"


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss; `source` names its file and function for error messages."""

    weight: float
    name: str
    function: Loss
    source: str

    def __post_init__(self) -> None:
        """Raise UsageError if the parameters of the function are not those of a loss."""
        for function in filter(None, (self.function, self.update_function)):
            self.parameters(function)

    @property
    def layer(self) -> keras.Layer | None:
        """The loss, if it is a Keras layer, and so can have weights."""
        function: Any = self.function
        return function if isinstance(function, keras.Layer) else None

    @property
    def update_function(self) -> Callable[..., object] | None:
        """The loss's method `update`, which trains the loss's weights, or None if there is no such method."""
        return getattr(self.function, "update", None)

    def parameters(self, function: Callable) -> tuple[int, list[str]]:
        """Return how many images `function` takes (2: clean and denoised), and the names of INPUTS that it declares."""
        parameters = plugins.parameters_of(getattr(function, "call", function), f"--loss: {self.source}")
        required = [one for one in parameters.values() if one.default is one.empty]
        positional = [
            one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        images = [one.name for one in positional if one.default is one.empty]
        misplaced = [one.name for one in positional if one.name in INPUTS]
        problem = ""
        for one in required:
            if one.kind is one.KEYWORD_ONLY and one.name not in INPUTS:
                problem = f"unknown input {one.name!r}{suggestion(one.name, INPUTS)} (known: {', '.join(INPUTS)})"
        if (len(images) != 2 and images not in ([], ["denoised"])) or misplaced:
            got = ", ".join(one.name for one in positional)
            problem = f"expected (clean, denoised), (denoised) or no positional parameters, got ({got})"
        if misplaced:
            problem += f"; write * before {misplaced[0]}, because further inputs are keyword-only"
        if problem:
            raise UsageError(f"--loss: {self.source}: {problem}")
        keywords = [one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY and one.name in INPUTS]
        return len(images), keywords

    @property
    def is_builtin(self) -> bool:
        """Whether the loss is one of LOSSES, or the regularization of the network."""
        return self.function in LOSSES.values() or self.is_regularization

    @property
    def is_regularization(self) -> bool:
        """Whether the loss is that of the network's regularizers."""
        return self.source == REGULARIZATION

    @property
    def sees_clean(self) -> bool:
        """Whether the loss takes the clean images."""
        return self.parameters(self.function)[0] == 2

    @property
    def inputs(self) -> set[str]:
        """The names of INPUTS that the loss declares."""
        functions = filter(None, (self.function, self.update_function))
        return {name for function in functions for name in self.parameters(function)[1]}

    def __call__(self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any]) -> tf.Tensor:
        """Return the loss of each image, float32 [batch], without the weight."""
        return self._call(self.function, clean, denoised, inputs)

    def update(self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any]) -> None:
        """Train the loss's weights with a batch, if the loss has a method for it."""
        if self.update_function is not None:
            self._call(self.update_function, clean, denoised, inputs)

    def _call(self, function: Callable, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any]) -> Any:
        images, names = self.parameters(function)
        return function(*(clean, denoised)[2 - images :], **{name: inputs[name] for name in names})


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """The sum of weight * loss over one or more terms."""

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
        layers = [layer for layer in self.layers if not hasattr(layer, "update")]
        return [variable for layer in layers for variable in layer.trainable_variables]

    @property
    def has_updates(self) -> bool:
        """Whether any term has a method `update`."""
        return any(term.update_function is not None for term in self.terms)

    def __call__(
        self, clean: tf.Tensor, denoised: tf.Tensor, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, tf.Tensor]:
        """Return a float32 [batch] for each of `names`: the sum, and the terms without their weights.

        `inputs` are those of INPUTS that the terms declare.
        """
        values = [term(clean, denoised, inputs or {}) for term in self.terms]
        weighted = [
            value if term.weight == 1 else term.weight * value for term, value in zip(self.terms, values, strict=True)
        ]
        total = tf.add_n(weighted) if len(weighted) > 1 else weighted[0]
        return dict(zip(self.names, [total, *values], strict=False))


def with_regularization(loss: CompositeLoss, model: keras.Model) -> CompositeLoss:
    """Return `loss` plus the losses of the network's regularizers, as Keras's `fit` adds them, if it has any.

    They replace those of another network, if `loss` has them.
    """

    def regularization(denoised: tf.Tensor) -> tf.Tensor:
        # Losses of activities are those of the last call, the one that returned `denoised`.
        return tf.fill(tf.shape(denoised)[:1], tf.add_n(model.losses))

    terms = [term for term in loss.terms if not term.is_regularization]
    if model.losses or len(terms) < len(loss.terms):  # losses of activities exist only after a call
        terms.append(Term(1.0, "regularization", regularization, REGULARIZATION))
    return CompositeLoss(tuple(terms))


def build(text: str, seed: int = 0) -> CompositeLoss:
    """Return the loss that `config.loss` describes, such as "bce + 0.1*my_losses.py:my_loss".

    Runs the users' files that it names. The initial weights of a loss are drawn from `seed`. Raises UsageError if there
    is no such loss.
    """
    terms = expression.parse(text)
    # The names of terms must differ, also from "total", which is TensorBoard's name for the sum.
    _, *names = plugins.unique_names(["total", *(plugins.label(term.name) for term in terms)], separator="_")
    return CompositeLoss(
        tuple(
            _term(
                term.weight,
                name,
                plugins.load(LOSSES, term.name, "--loss"),
                plugins.source(term.name),
                seed,
            )
            for term, name in zip(terms, names, strict=True)
        )
    )


def _term(weight: float, name: str, function: Any, source: str, seed: int) -> Term:
    """Return a term; a class is instantiated, with initial weights drawn from `seed`."""
    if isinstance(function, keras.Layer):
        raise UsageError(f"--loss: {source}: expected a function or a class, got a layer; pass its class")
    if inspect.isclass(function):
        if not issubclass(function, keras.Layer):
            raise UsageError(f"--loss: {source}: expected a function or a subclass of keras.Layer, got another class")
        with (
            keras_seed(derive_seed(seed, f"initial weights of loss {name}")),
            errors_with_line(f"--loss: {source}", file_of(function.__init__)),
        ):
            function = function()
    return Term(weight, name, function, source)
