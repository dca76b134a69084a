"""`CompositeLoss`: what a run minimizes, a weighted sum of losses."""

import dataclasses

import tensorflow as tf

from dae import plugins
from dae.errors import UsageError
from dae.losses import expression
from dae.losses.losses import LOSSES, Loss


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted loss; `source` names its file and function for error messages."""

    weight: float
    name: str
    function: Loss
    source: str

    @property
    def is_builtin(self) -> bool:
        """Whether the loss is one of LOSSES."""
        return self.function in LOSSES.values()


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """The sum of weight * loss over one or more terms."""

    terms: tuple[Term, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values: "loss", and "loss_bce" ... for each term if there are several."""
        return ("loss", *(f"loss_{term.name}" for term in self.terms if len(self.terms) > 1))

    def __call__(self, clean: tf.Tensor, denoised: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return a float32 [batch] for each of `names`: the sum, and the terms without their weights."""
        values = [term.function(clean, denoised) for term in self.terms]
        weighted = [
            value if term.weight == 1 else term.weight * value for term, value in zip(self.terms, values, strict=True)
        ]
        total = tf.add_n(weighted) if len(weighted) > 1 else weighted[0]
        return dict(zip(self.names, [total, *values], strict=False))


def build(text: str, function: Loss | None = None) -> CompositeLoss:
    """Return the loss that `config.loss` describes, such as "bce + 0.1*my_losses.py:my_loss".

    Runs the users' files that it names. If `text` records a Python function, that function must be passed too. Raises
    UsageError if there is no such loss.
    """
    if plugins.is_recorded_callable(text):
        name = plugins.label(text)
        if function is None:
            raise UsageError(f"--loss: {name} was a Python function; pass it again: dae.train(config, loss={name})")
        return CompositeLoss((Term(1.0, name, function, name),))
    terms = expression.parse(text)
    # The names of terms must differ, also from "total", which is TensorBoard's name for the sum.
    _, *names = plugins.unique_names(["total", *(plugins.label(term.name) for term in terms)], separator="_")
    return CompositeLoss(
        tuple(
            Term(
                term.weight,
                name,
                plugins.load(LOSSES, term.name, "--loss"),
                plugins.substitute(term.name, lambda one: f"{one.path}:{one.function}"),
            )
            for term, name in zip(terms, names, strict=True)
        )
    )
