"""The grammar of --loss: terms joined by +, each NAME or WEIGHT*NAME. Nothing in it is evaluated as code."""

import math
import re
from typing import NamedTuple

from dae import plugins
from dae.errors import UsageError

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>{plugins.REFERENCE}|[^\W\d]\w*)\s*(?P<end>\+|$)", re.ASCII
)


class WeightedName(NamedTuple):
    """One term of an expression: a weight, and the name of a loss or a reference to a user's function."""

    weight: float
    name: str

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{repr(self.weight).removesuffix('.0')}*{self.name}"


def parse(text: str) -> tuple[WeightedName, ...]:
    """Return the terms of `text`, at least one. Raises UsageError, with the position, for anything else.

    A recorded Python function is one term.
    """
    if plugins.is_recorded_callable(text):
        return (WeightedName(1.0, text),)
    terms: list[WeightedName] = []
    position, at_end = 0, False
    while not at_end:
        match = _TERM.match(text, position)
        if match is None:
            raise UsageError(
                f"--loss: invalid expression {text!r} at {text[position:].strip()!r}; "
                "expected terms NAME or WEIGHT*NAME, joined by +"
            )
        term = WeightedName(float(match["weight"] or 1), match["name"])
        if not 0 < term.weight < math.inf:
            raise UsageError(f"--loss: the weight of {term.name} must be a finite number > 0, got {match['weight']}")
        if term.name in (earlier.name for earlier in terms):
            raise UsageError(f"--loss: {term.name} occurs twice in {text!r}; give it one weight")
        terms.append(term)
        position, at_end = match.end(), match["end"] != "+"
    return tuple(terms)


def canonical(text: str) -> str:
    """Return the canonical spelling: `1*bce+.1 * ssim` becomes `bce + 0.1*ssim`. Raises UsageError as `parse` does."""
    return " + ".join(map(str, parse(text)))
