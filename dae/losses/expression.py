"""The grammar of --loss: terms joined by +, each a name or number*name. Nothing of it is evaluated as code."""

import math
import re
from typing import NamedTuple

from dae import plugins
from dae.errors import UsageError

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>{plugins.REFERENCE}|[^\W\d]\w*)\s*(?P<end>\+|$)", re.ASCII
)


class Term(NamedTuple):
    """A term of a sum: its weight, and the name of a loss or a function in a file of the user's own."""

    weight: float
    name: str

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{repr(self.weight).removesuffix('.0')}*{self.name}"


def parse(text: str, flag: str = "--loss") -> tuple[Term, ...]:
    """The terms of `text`, at least one; raises UsageError, naming `flag` and the place, where it is no such sum."""
    terms: list[Term] = []
    place, ended = 0, False
    while not ended:
        found = _TERM.match(text, place)
        if found is None:
            raise UsageError(
                f"{flag}: cannot read {text!r} at {text[place:].strip()!r}{_guess(text)}; "
                "it is to be one or more terms NAME or NUMBER*NAME, joined by +"
            )
        term = Term(float(found["weight"] or 1), found["name"])
        if not 0 < term.weight < math.inf:
            raise UsageError(f"{flag}: the weight {found['weight']} of {term.name} is not a finite number above 0")
        if term.name in [other.name for other in terms]:
            raise UsageError(f"{flag}: {text!r} has {term.name} twice; give it one weight")
        terms.append(term)
        place, ended = found.end(), found["end"] != "+"
    return tuple(terms)


def canonical(text: str, flag: str = "--loss") -> str:
    """The one spelling of a sum: `1*bce+.1 * ssim` is `bce + 0.1*ssim`; raises UsageError where it is none."""
    return " + ".join(map(str, parse(text, flag)))


def _guess(text: str) -> str:
    """`; did you mean 'x'?` where an operator too many is all that is wrong."""
    guess = re.sub(r"[\s*+]*\+[\s*+]*", " + ", text).strip(" *+")
    return f"; did you mean {guess!r}?" if guess != text.strip() and _TERM.match(guess) else ""
