"""`RunConfig`: every setting of a run, with its unit and default. A run is a pure function of it."""

import dataclasses
import functools
import json
import math
import os
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from dae import plugins
from dae.errors import UsageError, as_usage_error, shown, suggestion
from dae.losses import expression

# The value of `data` for arrays that were passed to `dae.train`.
PYTHON_DATA = "python:data"
# The noise level for clean images, that of the tutorial.
DEFAULT_NOISE_LEVEL = 0.5


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images to train, validate and test on."""

    dataset: str = "mnist"
    """Data set: mnist (part of the package), fashion_mnist or cifar10 (both downloaded by Keras)."""
    data: str | None = None
    """Your own images instead: a folder of pictures, an .npz or .npy file, an IDX file or a folder of IDX files."""
    image_size: int | tuple[int, int] | None = None
    """Scale pictures, and crop them to the centre, to this many pixels: one side, or height and width."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read."""
    grey: bool = False
    """Convert pictures in colour to grey."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in your images (default: 0 and 255 or 65535 for integers, 0 and 1 for floats)."""
    patch_size: int | None = None
    """Train on random squares of this many pixels, cut from images of any sizes; whole images are evaluated."""
    augment: bool = False
    """Flip and turn training images at random, by quarter turns if they are square."""
    train_examples: int | None = None
    """Train on the first N images only (default: all images that are not used for validation)."""
    validation_examples: int | None = None
    """Use the last N training images for validation; 0: no validation (default: a tenth, at most 5000)."""
    data_digest: Annotated[str | None, tyro.conf.Suppress] = None
    """SHA-256 of the images; recorded when a run starts and checked when it is resumed or rerun."""


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Noise that is added to clean images."""

    noise: str = "gaussian"
    """Noise model: gaussian, uniform, salt_pepper, masking, speckle, poisson, or your own FILE.py:FUNCTION."""
    noise_level: float | tuple[float, float] | None = None
    """Strength of the noise (gaussian: standard deviation; black is 0, white 1). Two values: drawn for each image
    (default: 0.5, or 0 for pairs of noisy and clean images; recorded)."""
    clip_noise: bool = True
    """Clip noisy images to [0, 1]."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and the loss it minimizes."""

    model: str = "conv"
    """Network: conv (that of the tutorial), blog, patches, unet, dncnn, or your own FILE.py:FUNCTION."""
    width: int = 1
    """Multiply the number of channels in each layer by this."""
    start_from: str | None = None
    """Start from the weights of this finished run's folder, or of a .keras or .h5 file (default: random weights)."""
    weights_digest: Annotated[str | None, tyro.conf.Suppress] = None
    """SHA-256 of these weights; recorded when a run starts and checked when it is resumed or rerun."""
    initial_brightness: float | None = None
    """Brightness of the network's first outputs, given by its last bias (default: mean of the images; recorded)."""
    loss: str = "bce"
    """Loss: bce, mse, mae, huber, charbonnier, ssim, ms_ssim, edges, frequency, a regularizer or self-supervised loss
    (docs/losses.md), your own FILE.py:FUNCTION, or a sum such as "bce + 0.1*ssim"."""
    bce_steps: int = 200
    """Steps in which bce fades into the loss, because many losses do not learn from random weights; 0: none."""
    metrics: tuple[str, ...] = ()
    """Further metrics of the evaluation, each your own FILE.py:FUNCTION."""


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """The optimizer and what it sees of the gradient."""

    optimizer: str = "adam"
    """Optimizer: adam, or soap, which needs a fraction of the epochs at a learning rate of about 0.02."""
    learning_rate: float = 1e-3
    """Learning rate; its peak, if a schedule changes it."""
    adam_beta_2: float = 0.999
    """Decay of the running mean of squared gradients."""
    max_gradient_norm: float | None = None
    """Scale gradients of a larger global norm down to this norm (default: no clipping)."""
    batch_size: int = 128
    """Images per training step."""
    ema_decay: float | None = None
    """Evaluate and export the exponential moving average of the weights, with this decay per step (default: none)."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and what changes meanwhile."""

    epochs: int = 50
    """Passes over the training images."""
    schedule: str = "constant"
    """Learning rate over the run: constant, or cosine, which ends at 0 and so allows no further epochs."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises linearly from 0 (cosine only)."""
    patience: int | None = None
    """Stop after N epochs in which the validation loss has not fallen below its lowest value (default: never)."""
    checkpoint_every: int | None = None
    """Save a checkpoint every N steps too (default: at the end of each epoch and on SIGINT, SIGTERM or
    SIGUSR1)."""


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The seed, and settings of the machine that decide the last bits of a result."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    shards: int | None = None
    """Parts of each batch that are computed in parallel, each with its own noise (default: one per GPU, or else
    per core; recorded)."""
    intra_op_threads: int | None = None
    """Threads within one operation (default: cores divided by shards; recorded)."""
    onednn: bool | None = None
    """Use oneDNN kernels, which are faster (default: yes, unless TF_ENABLE_ONEDNN_OPTS is 0; recorded)."""
    precision: str = "float32"
    """Compute the layers in float32, bfloat16 or float16; weights, loss and optimizer stay in float32."""
    compile: bool = False
    """Compile the computation of gradients with XLA."""
    deterministic: bool = True
    """Use only deterministic kernels on GPUs, which can be slower."""
    reduction: str = "exact"
    """How gradients of several workers are added: exact, the same bits for any number of workers, or fast."""


# A dataclass orders fields from its last base to its first.
@dataclasses.dataclass(frozen=True)
class RunConfig(RuntimeConfig, ScheduleConfig, OptimizationConfig, ModelConfig, NoiseConfig, DataConfig):
    """The settings that decide the result of a run; saved with it as `config.json`.

    Raises UsageError for an unknown field, and for a value of the wrong type or out of range, naming its flag.
    """

    def __new__(cls, /, *values: Any, **fields: Any) -> "RunConfig":
        """Refuse unknown fields; `__init__` would raise a TypeError."""
        for name in fields:
            if name not in _field_types():
                raise UsageError(f"RunConfig: unknown field {name!r}{suggestion(name, _field_types())}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, expected in _field_types().items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _coerce(value, expected))
            except TypeError:
                problem = f"expected {_type_name(expected)}, got {shown(value)}"
                functions = [each for each in (value if isinstance(value, list | tuple) else [value]) if callable(each)]
                if name in PLUGIN_FIELDS and functions:
                    function = getattr(functions[0], "__name__", "my_function")
                    problem += f"; pass a function as {plugins.call_with(name, function, 'RunConfig(...)')}"
                if name == "data" and (hasattr(value, "shape") or isinstance(value, dict)):
                    problem = "expected a path; pass arrays as dae.train(RunConfig(...), data=arrays)"
                raise UsageError(f"{flag(name)}: {problem}") from None
        for name, (is_allowed, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise UsageError(f"{flag(name)}: expected {allowed}, got {shown(value)}")
        expression.parse(self.loss)
        if self.warmup_ratio and self.schedule == "constant":
            raise UsageError(f"--warmup-ratio: {self.warmup_ratio} needs --schedule cosine")

    @property
    def noise_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level; equal if there is one level."""
        level = DEFAULT_NOISE_LEVEL if self.noise_level is None else self.noise_level
        return level if isinstance(level, tuple) else (level, level)


def flag(field_name: str) -> str:
    """Return the command-line flag of a field: `noise_level` -> `--noise-level`."""
    return "--" + field_name.replace("_", "-")


@functools.cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(RunConfig)


def _coerce(value: Any, expected: Any) -> Any:
    """Return `value` as one of type `expected`: a list as a tuple, 1 as 1.0. Raises TypeError for any other value."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        value = value.item()
    for kind in get_args(expected) if isinstance(expected, types.UnionType) else (expected,):
        items = get_args(kind)
        if items[-1:] == (Ellipsis,) and isinstance(value, list | tuple):
            return tuple(_coerce(item, items[0]) for item in value)
        if get_origin(kind) is tuple and isinstance(value, list | tuple) and len(value) == len(items):
            return tuple(_coerce(item, item_type) for item, item_type in zip(value, items, strict=True))
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        if type(value) is kind:
            return value
    raise TypeError


def _type_name(expected: Any) -> str:
    if isinstance(expected, types.UnionType):
        return " or ".join(map(_type_name, get_args(expected)))
    if get_origin(expected) is tuple:
        return f"[{', '.join(map(_type_name, get_args(expected)))}]"
    if expected is Ellipsis:
        return "..."
    return "null" if expected is type(None) else expected.__name__


def _ascending(level: float | tuple[float, float]) -> bool:
    low, high = level if isinstance(level, tuple) else (level, level)
    return 0 <= low <= high < math.inf


def _ends(ends: tuple[float, float]) -> bool:
    return -1e30 <= ends[0] < ends[1] <= 1e30 and ends[1] - ends[0] >= 1e-30  # images are float32


def _sides(size: int | tuple[int, int]) -> bool:
    return all(11 <= side <= 2**15 for side in (size if isinstance(size, tuple) else (size,)))


def _short(text: str) -> bool:
    return len(text) <= 5_000  # keeps the time to parse a hostile expression below a second


# A test of each value that is not None, and what it allows.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (_sides, "one or two whole numbers from 11 (the window of SSIM) to 32768"),
    "value_range": (_ends, "two finite numbers in ascending order that float32 can tell apart"),
    "patch_size": (lambda side: 11 <= side <= 2**15, "a whole number from 11 (the window of SSIM) to 32768"),
    "train_examples": (lambda count: 1 <= count < 2**63, "a whole number from 1 to 2**63 - 1"),
    "validation_examples": (lambda count: 0 <= count < 2**63, "a whole number from 0 to 2**63 - 1"),
    "noise": (_short, "at most 5,000 characters"),
    "noise_level": (_ascending, "a finite number >= 0, or two in ascending order"),
    "width": (lambda factor: 1 <= factor <= 1024, "a whole number from 1 to 1024"),
    "loss": (_short, "at most 5,000 characters"),
    "initial_brightness": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "bce_steps": (lambda steps: 0 <= steps < 2**63, "a whole number from 0 to 2**63 - 1"),
    "learning_rate": (lambda rate: 0 < rate < math.inf, "a finite number > 0"),
    "adam_beta_2": (lambda beta: 0 <= beta < 1, "a number in [0, 1)"),
    "max_gradient_norm": (lambda norm: 0 < norm < math.inf, "a finite number > 0"),
    "ema_decay": (lambda decay: 0 < decay < 1, "a number between 0 and 1"),
    "patience": (lambda epochs: 1 <= epochs < 2**63, "a whole number from 1 to 2**63 - 1"),
    "batch_size": (lambda size: 1 <= size <= 10**6, "a whole number from 1 to 1,000,000"),
    "epochs": (lambda count: 1 <= count <= 10**6, "a whole number from 1 to 1,000,000"),
    "warmup_ratio": (lambda ratio: 0 <= ratio < 1, "a number in [0, 1)"),
    "checkpoint_every": (lambda steps: 1 <= steps < 2**63, "a whole number from 1 to 2**63 - 1"),
    "seed": (lambda seed: 0 <= seed < 2**63, "a whole number from 0 to 2**63 - 1"),
    "shards": (lambda count: 1 <= count <= 1024, "a whole number from 1 to 1024"),
    "intra_op_threads": (lambda count: 1 <= count <= 1024, "a whole number from 1 to 1024"),
    "precision": (lambda name: name in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
    "reduction": (lambda name: name in ("exact", "fast"), "exact or fast"),
}

# SOAP with a long warm-up, as in all presets that use it.
_SOAP = RunConfig(
    optimizer="soap", schedule="cosine", warmup_ratio=0.3, adam_beta_2=0.99, max_gradient_norm=0.1, batch_size=64
)

PRESETS = {
    "default": RunConfig(),
    # The tutorial to the letter: trains on all 60,000 images, without validation, and starts with grey outputs.
    "tutorial": RunConfig(validation_examples=0, initial_brightness=0.5),
    # As good as the default in a twenty-fifth of its epochs (docs/results.md).
    "fast": dataclasses.replace(_SOAP, learning_rate=0.03, batch_size=80, epochs=2),
    # More than 20 dB in a few seconds of training.
    "good": dataclasses.replace(_SOAP, model="patches", learning_rate=0.01, train_examples=32_000, epochs=1),
    # More than 21 dB in a few minutes.
    "best": dataclasses.replace(_SOAP, model="unet", learning_rate=0.003, epochs=3),
    # A first look, in seconds.
    "quick": RunConfig(train_examples=10_000, validation_examples=1_000, epochs=3),
}

# Settings that default to None and are filled in, and recorded, when a run starts.
RECORDED = (
    "noise_level",
    "validation_examples",
    "initial_brightness",
    "shards",
    "intra_op_threads",
    "onednn",
    "data_digest",
    "weights_digest",
)

# Settings that can name functions in users' files.
PLUGIN_FIELDS = ("noise", "model", "loss", "metrics")

# Version of config.json; raised when the same file would no longer give the same run.
FORMAT = 5


def to_json(config: RunConfig) -> str:
    """Return `config` as JSON text, one field per line."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str, source: str) -> RunConfig:
    """Return the configuration in JSON `text`; missing fields have their defaults.

    Raises UsageError, naming `source`, for text that is not JSON, an unknown field, or a value of the wrong type or
    out of range.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source}: expected a JSON object, got a {type(values).__name__}")
    version = values.pop("format", FORMAT)
    if version != FORMAT:
        raise UsageError(f"{source}: expected format {FORMAT}, got {version!r}, of another version of dae")
    with as_usage_error(source):
        return RunConfig(**values)


def read(path: Path) -> RunConfig:
    """Return the configuration saved at `path`. Raises UsageError if it cannot be read.

    Users' files that it names, such as a run's `code/my_losses.py`, lie relative to the file's own folder.
    """
    try:
        config = from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        is_folder = path.name == "config.json" and path.parent.is_dir()
        missing = f"{path.parent}: not a run's folder (it has no {path.name})" if is_folder else f"{path}: no such file"
        raise UsageError(missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    return map_plugins(config, lambda name, text: plugins.resolve_paths(text, path.parent))


def map_plugins(config: RunConfig, change: Callable[[str, str], str]) -> RunConfig:
    """Return `config` with `change(field name, text)` for each setting that can name users' files."""
    changes: dict[str, Any] = {
        name: map_texts(getattr(config, name), functools.partial(change, name)) for name in PLUGIN_FIELDS
    }
    return dataclasses.replace(config, **changes)


def map_texts(value: str | tuple[str, ...], change: Callable[[str], str]) -> str | tuple[str, ...]:
    """Return the value of a field of PLUGIN_FIELDS, one text or several, with `change` applied to each text."""
    return change(value) if isinstance(value, str) else tuple(change(text) for text in value)


def canonicalize(config: RunConfig) -> RunConfig:
    """Return `config` with one spelling of the loss, absolute paths, and the digests of users' files.

    Raises UsageError if one of these files cannot be read or has another digest than `config` says.
    """
    config = dataclasses.replace(config, loss=expression.canonical(config.loss))
    paths = {
        name: os.path.abspath(path)
        for name in ("data", "start_from")
        if (path := getattr(config, name)) and path != PYTHON_DATA
    }
    config = dataclasses.replace(config, **paths)
    return map_plugins(config, lambda name, text: plugins.with_absolute_paths_and_digests(text, flag(name)))


def config_for_resume(saved: RunConfig, requested: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration that resumes the run in `run_dir`, which was started with `saved`, as `requested`.

    Both are canonical. These may differ: more epochs at a constant learning rate; `checkpoint_every`; None for a
    RECORDED setting; the places of the data and of the initial weights, whose digests are checked; and that of a user's
    file, for which the run's copy is used. Raises UsageError, with both values, for any other difference.
    """
    changes: dict[str, Any] = {name: getattr(saved, name) for name in RECORDED if getattr(requested, name) is None}
    for name in PLUGIN_FIELDS:
        if _without_paths(saved, name) == _without_paths(requested, name):
            changes[name] = getattr(saved, name)
    if saved.data == PYTHON_DATA and requested.data is None:  # the error will be that they were not passed again
        changes["data"] = PYTHON_DATA
    config = dataclasses.replace(requested, **changes)
    allowed = {"checkpoint_every"}
    for place, digest in (("data", "data_digest"), ("start_from", "weights_digest")):
        if None not in (getattr(saved, place), getattr(requested, place)) and getattr(saved, digest) is not None:
            allowed.add(place)
    if config.epochs > saved.epochs and saved.schedule == "constant":
        allowed.add("epochs")
    if differing := differences(saved, config, allowed):
        raise UsageError(
            f"--resume: {run_dir} is another run ({differing}); "
            "only --epochs, with a constant learning rate, can grow, and --checkpoint-every change"
        )
    return config


def differences(before: RunConfig, now: RunConfig, allowed: Collection[str] = ()) -> str:
    """Return the fields that differ, except those that are allowed to, with both values; or an empty string.

    Places of users' files do not count.
    """
    return "; ".join(
        f"{flag(name)} was {getattr(before, name)!r}, now {getattr(now, name)!r}"
        for name in _field_types()
        if name not in allowed and _without_paths(before, name) != _without_paths(now, name)
    )


def _without_paths(config: RunConfig, name: str) -> Any:
    """Return the value of a field, without the places of the users' files that it names."""
    value = getattr(config, name)
    return map_texts(value, plugins.without_paths) if name in PLUGIN_FIELDS else value
