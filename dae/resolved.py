"""`Resolved`: what a run derives from its configuration, its images and the machine on which it starts.

It is recorded as resolved.json beside config.json. With both, a rerun on another machine gives the same bits; from
config.json alone, a machine with another number of cores gives the same images, noise and steps, but other last bits.
"""

import dataclasses
import json
from pathlib import Path
from typing import get_origin

from dae.data.values import ValueRange
from dae.errors import as_usage_error

FILE = "resolved.json"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The values that a run uses where its configuration leaves the choice, and the digests of what it reads."""

    noise_level: tuple[float, float]
    """The lowest and the highest noise level; equal if there is one level."""
    initial_brightness: float
    """Brightness of the network's first outputs."""
    image_shape: tuple[int, int, int]
    """The (H, W, C) that the network is built for: that of an image or a patch."""
    value_range: ValueRange
    """The values of black and white in the training images, and the type that these are stored in."""
    validation_examples: int
    """The number of validation images."""
    shards: int
    """Shards of each batch. They decide the last bits of a result, like the following two."""
    intra_op_threads: int
    """Threads within one operation."""
    onednn: bool
    """True if TensorFlow uses oneDNN."""
    data_digest: str
    """SHA-256 of all images."""
    weights_digest: str
    """SHA-256 of the weights of --start-from; empty without it."""
    variables: str = ""
    """The environment variables that change numbers, as NAME=value."""


def to_json(resolved: Resolved) -> str:
    """Return `resolved` as JSON text, one field per line."""
    return json.dumps(dataclasses.asdict(resolved), indent=2) + "\n"


def read(folder: Path) -> Resolved:
    """Return what the run in `folder` recorded. Raises UsageError if the file is missing or damaged."""
    problem = "missing or damaged; restore it, or start another run"
    with as_usage_error(folder / FILE, problem, OSError, ValueError, TypeError, AttributeError, KeyError):
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
        low, high = map(float, fields["noise_level"])
        height, width, channels = map(int, fields["image_shape"])
        fields |= {"noise_level": (low, high), "image_shape": (height, width, channels)}
        fields["value_range"] = ValueRange(**fields["value_range"])
        for name, kind in Resolved.__annotations__.items():
            if name in fields and type(fields[name]) is not (get_origin(kind) or kind):
                raise TypeError(name)
        return Resolved(**fields)
