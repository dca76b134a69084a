"""`RunConfig`: every knob of a run, with its unit and default. A run is a pure function of it."""

import dataclasses
import json
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from dae import plugins
from dae.errors import UsageError, nearest
from dae.losses import expression


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What decides the result of a run; saved with it as `config.json`."""

    dataset: str = "mnist"
    """Images to train on: mnist, which comes with the package; fashion_mnist, cifar10, which Keras downloads."""
    data: str | None = None
    """Images of your own instead: an .npz or .npy file, an IDX file or a folder of them, or a folder of pictures."""
    image_size: int | tuple[int, int] | None = None
    """Bring pictures to so many pixels, one side or height and width: scaled to cover that, then cut to its middle."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read."""
    train_examples: int | None = None
    """Train on the first so many images only (default: all that do not validate)."""
    validation_examples: int | None = None
    """The last so many training images validate instead of training; 0: none (default: a tenth, at most 5000)."""
    noise: str = "gaussian"
    """Noise: gaussian, uniform, salt_pepper, masking, speckle, poisson, or a function of your own, FILE.py:FUNCTION."""
    noise_level: float | tuple[float, float] = 0.5
    """Strength of the noise, for gaussian its standard deviation (black 0, white 1); two: a range, drawn per image."""
    clip_noise: bool = True
    """Clip noisy images to [0, 1]."""
    model: str = "conv"
    """Network: conv, the tutorial's."""
    loss: str = "bce"
    """Loss: bce, mse, mae, huber, charbonnier, ssim, one of your own, FILE.py:FUNCTION, or a sum, "bce + 0.1*ssim"."""
    width: int = 1
    """Multiplies the network's numbers of channels."""
    optimizer: str = "adam"
    """Optimizer: adam, or soap, which needs a fraction of the epochs at a learning rate of about 0.02."""
    learning_rate: float = 1e-3
    """The optimizer's learning rate, its highest where a schedule changes it."""
    schedule: str = "constant"
    """Learning rate over the run: constant, or cosine, down to 0 at the end, so that no epochs can be added."""
    warmup_ratio: float = 0.0
    """With cosine: share of the steps, at the start, in which the learning rate rises."""
    adam_beta_2: float = 0.999
    """How slowly the optimizer forgets the size of past gradients."""
    max_gradient_norm: float | None = None
    """Scale a gradient of a larger global norm down to it (default: never)."""
    batch_size: int = 128
    """Images per training step."""
    epochs: int = 50
    """Passes over the training images."""
    checkpoint_every: int | None = None
    """Save also after every so many steps within an epoch (default: at the end of each epoch, and when stopped)."""
    seed: int = 0
    """Decides initial weights, order and noise."""
    micro_batches: int | None = None
    """Parts of each batch, computed side by side; decides last bits (default: one per core, then recorded)."""
    intra_op_threads: int | None = None
    """Threads inside one operation; decides last bits (default: the cores that each part has, then recorded)."""
    onednn: bool | None = None
    """Use oneDNN's kernels; fast, with other last bits (default: as TF_ENABLE_ONEDNN_OPTS, else yes; recorded)."""
    data_digest: Annotated[str | None, tyro.conf.Suppress] = None
    """SHA-256 of the images; recorded when the run starts, checked whenever it is resumed or rerun."""

    def __post_init__(self) -> None:
        for name, (allowed, description) in _ALLOWED.items():
            value = getattr(self, name)
            if not allowed(value):
                raise UsageError(f"{flag(name)}: {value!r} is not {description}")
        if self.warmup_ratio and self.schedule == "constant":
            raise UsageError(f"--warmup-ratio: is {self.warmup_ratio}, which needs --schedule cosine")

    @property
    def noise_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level; equal where there is one level."""
        return self.noise_level if isinstance(self.noise_level, tuple) else (self.noise_level, self.noise_level)


def _none_or_positive(count: int | None) -> bool:
    return count is None or count >= 1


def _in_order(level: float | tuple[float, float]) -> bool:
    low, high = level if isinstance(level, tuple) else (level, level)
    return 0 <= low <= high < math.inf


def _none_or_sides(size: int | tuple[int, int] | None) -> bool:
    sides = size if isinstance(size, tuple) else (size,)
    return size is None or all(side is not None and 11 <= side <= 2**15 for side in sides)


def _short(text: str) -> bool:
    return len(text) <= 5_000  # so that a hostile one takes no more than a second


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "noise": (_short, "of at most 5,000 characters"),
    "loss": (_short, "of at most 5,000 characters"),
    "train_examples": (_none_or_positive, "a whole number from 1 up"),
    "image_size": (_none_or_sides, "one or two whole numbers from 11 (SSIM needs that) to 32768"),
    "validation_examples": (lambda count: count is None or count >= 0, "a whole number from 0 up"),
    "noise_level": (_in_order, "a finite number from 0 up, or two, the lower first"),
    "learning_rate": (lambda rate: 0 < rate < math.inf, "a finite number above 0"),
    "batch_size": (lambda size: 1 <= size <= 10**6, "a whole number from 1 to a million"),
    "width": (lambda times: 1 <= times <= 1024, "a whole number from 1 to 1024"),
    "warmup_ratio": (lambda ratio: 0 <= ratio < 1, "a number from 0 up, below 1"),
    "adam_beta_2": (lambda beta: 0 <= beta < 1, "a number from 0 up, below 1"),
    "max_gradient_norm": (lambda norm: norm is None or 0 < norm < math.inf, "a finite number above 0"),
    "micro_batches": (lambda count: count is None or 1 <= count <= 1024, "a whole number from 1 to 1024"),
    "epochs": (lambda count: 1 <= count <= 10**6, "a whole number from 1 to a million"),
    "checkpoint_every": (_none_or_positive, "a whole number from 1 up"),
    "seed": (lambda seed: 0 <= seed < 2**63, "a whole number from 0 to 2**63 - 1"),
    "intra_op_threads": (lambda count: count is None or 1 <= count <= 1024, "a whole number from 1 to 1024"),
}

PRESETS = {
    "default": RunConfig(),
    # The tutorial to the letter: all 60,000 images train, none validate.
    "tutorial": RunConfig(validation_examples=0),
    # Better than the default in a tenth of its epochs; experiments/RESULTS.md has both with three seeds.
    "fast": RunConfig(
        optimizer="soap",
        learning_rate=0.02,
        schedule="cosine",
        warmup_ratio=0.3,
        adam_beta_2=0.99,
        max_gradient_norm=0.1,
        epochs=5,
    ),
    # A first look in well under a minute.
    "quick": RunConfig(train_examples=10_000, validation_examples=1_000, epochs=3),
}

# What None leaves to the machine or the data is filled in when a run starts, and then part of it.
RECORDED = ("validation_examples", "micro_batches", "intra_op_threads", "onednn", "data_digest")

# What may name functions in files of the user's own.
MAY_NAME_CODE = ("noise", "loss")

# Written to every config.json; to be raised when a file written now could be misread by what reads it today.
FORMAT = 1


def flag(field_name: str) -> str:
    """The command-line flag of a field: `noise_level` -> `--noise-level`."""
    return "--" + field_name.replace("_", "-")


def to_json(config: RunConfig) -> str:
    """`config` as JSON text, one field a line."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str, source: str) -> RunConfig:
    """The configuration in JSON `text`; fields that are left out have their defaults.

    Raises UsageError, naming `source`, for text that is not JSON, an unknown field, or a value of the
    wrong type or out of range.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source}: holds a JSON {type(values).__name__}, not an object of fields")
    format_read = values.pop("format", FORMAT)
    if format_read != FORMAT:
        raise UsageError(f"{source}: has format {format_read!r}, of a newer version of dae; this one reads {FORMAT}")
    kinds = get_type_hints(RunConfig)
    for name, value in values.items():
        if name not in kinds:
            raise UsageError(f"{source}: unknown field {name!r}{nearest(name, kinds)}")
        try:
            values[name] = _of_kind(kinds[name], value)
        except TypeError:
            raise UsageError(f"{source}: {name} is {value!r}, which is not of type {_in_words(kinds[name])}") from None
    try:
        return RunConfig(**values)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def _of_kind(kind: Any, value: Any) -> Any:
    """A value from JSON as one of the type `kind`: a list as a tuple, and 1 as 1.0; raises TypeError for another."""
    for one in get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        items = get_args(one)
        if get_origin(one) is tuple and isinstance(value, list) and len(value) == len(items):
            return tuple(_of_kind(item, part) for item, part in zip(items, value, strict=True))
        if one is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        if type(value) is one:
            return value
    raise TypeError


def _in_words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_in_words, get_args(kind)))}]"
    return "null" if kind is type(None) else kind.__name__


def read(path: Path) -> RunConfig:
    """The configuration saved at `path`; raises UsageError where it cannot be read.

    The user's files that it names, such as a run's `code/my_losses.py`, are those beside it.
    """
    try:
        config = from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    return with_code(config, lambda name, text: plugins.located(text, path.parent))


def with_code(config: RunConfig, change: Callable[[str, str], str]) -> RunConfig:
    """`config` with `change(field name, text)` for each setting that may name files of the user's own."""
    changes: dict[str, Any] = {name: change(name, getattr(config, name)) for name in MAY_NAME_CODE}
    return dataclasses.replace(config, **changes)


def pinned(config: RunConfig) -> RunConfig:
    """`config` with its loss in one spelling, and the user's paths made absolute, those of .py files with digests.

    Raises UsageError where the loss is no sum, or a .py file cannot be read.
    """
    if not plugins.is_given(config.loss):
        config = dataclasses.replace(config, loss=expression.canonical(config.loss, flag("loss")))
    if config.data is not None:
        config = dataclasses.replace(config, data=os.path.abspath(config.data))
    return with_code(config, lambda name, text: plugins.pinned(text, flag(name)))


def resuming(saved: RunConfig, asked: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration to go on with, where `asked` wants to resume the run in `run_dir`, made with `saved`.

    Both are `pinned`. Raises UsageError, with both values of each field, where it asks for another run. Four things
    may differ: more epochs of a constant learning rate, another `checkpoint_every`, None where the run has RECORDED a
    value, and the place of a file of the user's own, for which the run's copy is used.
    """
    recorded = {name: getattr(saved, name) for name in RECORDED if getattr(asked, name) is None}
    asked = with_code(dataclasses.replace(asked, **recorded), lambda name, text: _same_code(name, text, saved, run_dir))
    changes = [
        f"{flag(field.name)} was {getattr(saved, field.name)!r}, now {getattr(asked, field.name)!r}"
        for field in dataclasses.fields(RunConfig)
        if getattr(saved, field.name) != getattr(asked, field.name)
        and field.name != "checkpoint_every"
        and not (field.name == "epochs" and asked.epochs > saved.epochs and saved.schedule == "constant")
    ]
    if changes:
        raise UsageError(
            f"--resume: {run_dir} is another run ({'; '.join(changes)}); "
            "only --epochs may grow, with --schedule constant, and --checkpoint-every change"
        )
    return asked


def _same_code(name: str, asked: str, saved: RunConfig, run_dir: Path) -> str:
    """The saved setting where what is `asked` is the same functions of the same texts, wherever these lie."""
    before = getattr(saved, name)
    parts = [plugins.substitute(text, lambda one: f"{one.function}@{one.digest}") for text in (before, asked)]
    if parts[0] == parts[1]:
        return before
    known = {one.digest for one in plugins.references(before)}
    edited = [one.path for one in plugins.references(asked) if one.digest not in known]
    if edited and plugins.label(before) == plugins.label(asked):
        raise UsageError(
            f"{flag(name)}: {' and '.join(edited)}: not the text that {run_dir} was begun with; leave {flag(name)} "
            "out to go on with the run's own copy, or begin another run"
        )
    return asked
