"""`RunConfig`: every setting of a run, with its unit and default. A run is a pure function of it.

It holds what the user asks for. What a run derives where the configuration leaves a choice is in dae/resolved.py.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_origin, get_type_hints

from dae import plugins
from dae.errors import UsageError, as_usage_error, lookup, shown, suggestion
from dae.losses import expression

# A name or FILE.py:FUNCTION. Type checkers must accept a function too; a configuration then holds its record.
if TYPE_CHECKING:
    FunctionName: TypeAlias = Any
else:
    FunctionName = str

# The value of `data` for arrays that were passed to `dae.train`.
PYTHON_DATA = "python:data"
# Fields whose files can move between the parts of a run, because their digests are compared.
PATH_FIELDS = ("data", "noisy", "clean", "start_from")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images to train, validate and test on."""

    dataset: str = "mnist"
    """Data set: mnist (part of the package), fashion_mnist or cifar10 (both downloaded by Keras)."""
    data: str | None = None
    """Path of your images, instead of --dataset: a folder of pictures, an .npz, .npy or IDX file, or a folder of IDX
    files. The names of folders or arrays say which images are for training or tests, and which are noisy or clean."""
    noisy: str | None = None
    """Folder of noisy pictures, instead of --data, whatever its name. With --clean: the noisy pictures of pairs.
    Without: there are no clean pictures, and no noise is added; this can then also be a single picture or array."""
    clean: str | None = None
    """Folder of clean pictures, instead of --data, whatever its name. With --noisy: they have the names of the noisy
    pictures. Without: there are only clean pictures, and noise is added."""
    image_size: int | tuple[int, int] | None = None
    """Resize and centre-crop pictures to this many pixels: one side of a square, or height and width."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read."""
    grey: bool = False
    """Convert pictures in colour to grey."""
    value_range: tuple[float, float] | None = None
    """Dynamic range of your images, the values of black and white; None: 0 and 255 or 65535 for integers, 0 and 1
    for floats."""
    axes: str | None = None
    """Axes of arrays, one letter each, such as NYXC, NCYX or YXZ (slices last): Y is for rows, X for columns, C for
    channels, others count images; None: by the shape, where it leaves no doubt."""
    patch_size: int | None = None
    """Train on random square crops with this side in pixels, from images of any sizes; evaluate whole images."""
    patches_per_epoch: int | None = None
    """Patches in an epoch, shared among the images by area; None: as many as fit into the images."""
    augment: bool = False
    """Data augmentation: random flips and, if images or patches are square, rotations by multiples of 90 degrees."""
    train_examples: int | None = None
    """Train on at most the first N images; None: on all that are not used for validation."""
    validation_examples: int | None = None
    """Use the last N training images for validation; 0: no validation; None: a tenth, at most 5000."""


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Noise that is added to clean images."""

    noise: FunctionName = "gaussian"
    """Noise model: gaussian, uniform, salt_pepper, masking, speckle, poisson, or FILE.py:FUNCTION for your own."""
    noise_level: float | tuple[float, float] | None = None
    """Strength of the noise (gaussian: standard deviation; black is 0, white 1). Two values: drawn uniformly
    for each image; None: 0.5, or 0 for pairs of noisy and clean images. On noisy pictures alone: the level of their
    noise, which some losses need; None: estimated."""
    clip_noise: bool = True
    """Clip noisy images to [0, 1]."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and the loss it minimizes."""

    model: FunctionName = "conv"
    """Network: conv (that of the tutorial), blog, patches, unet, residual_unet (for photographs), dncnn, or
    FILE.py:FUNCTION for your own."""
    width: int = 1
    """Multiply the number of channels in each layer by this."""
    start_from: str | None = None
    """Start from the weights of this run's folder, or of a .keras or .h5 file; None: from random weights."""
    initial_brightness: float | None = None
    """Mean brightness of the network's outputs before training, set by its last bias; None: that of the images."""
    loss: FunctionName = "bce"
    """Loss: bce, mse, mae, huber, charbonnier, ssim, ms_ssim, edges, frequency, a regularizer or self-supervised loss
    (docs/losses.md), a function in your file, FILE.py:FUNCTION, or a sum such as "bce + 0.1*ssim"."""
    bce_steps: int = 200
    """BCE warm-up: steps in which BCE, with a weight that falls linearly from 1 to 0, is mixed into the loss, because
    many losses do not learn from random weights; 0: none."""
    metrics: tuple[FunctionName, ...] = ()
    """Further metrics of the evaluation, each a function in your file, FILE.py:FUNCTION."""


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """The optimizer, and what happens to its gradients."""

    optimizer: FunctionName = "adam"
    """Optimizer: adam; soap, which needs a fraction of the epochs at a learning rate of 0.003 (deep networks) to 0.03
    (conv); Keras's sgd, adamw, lion, muon and others (docs/optimizers.md); or FILE.py:FUNCTION for your own."""
    learning_rate: float = 1e-3
    """Learning rate; its peak, if a schedule changes it."""
    adam_beta_2: float = 0.999
    """The optimizer's `beta_2`, in Adam the decay of the running mean of squared gradients; optimizers without one
    reject all values but the default."""
    max_gradient_norm: float | None = None
    """Gradient clipping: scale gradients with a larger global norm down to this norm; None: no clipping."""
    batch_size: int = 128
    """Images per training step."""
    ema_decay: float | None = None
    """Evaluate and export the exponential moving average of the weights, with this decay per step; None: the weights
    themselves."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Length of the training, learning-rate schedule, early stopping and checkpoints."""

    epochs: int = 50
    """Passes over the training images."""
    schedule: FunctionName = "constant"
    """Learning rate over the run: constant; cosine, which ends at 0 and so allows no further epochs; or
    FILE.py:FUNCTION for your own."""
    warmup_ratio: float = 0.0
    """Learning-rate warm-up: fraction of the steps in which the rate rises linearly from 0 (cosine, or
    your own schedule with a parameter `warmup_ratio`)."""
    patience: int | None = None
    """Early stopping: stop after N epochs without a new lowest validation loss (without clean images,
    blind_spot_error); None: never."""
    checkpoint_every: int | None = None
    """Also save a checkpoint every N steps; None: only at the end of each epoch and on SIGINT, SIGTERM, SIGHUP or
    SIGUSR1."""


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The seed, and settings of the machine that decide the last bits of a result."""

    seed: int = 0
    """Seed of the initial weights, shuffling, augmentation and noise."""
    shards: int | None = None
    """Parts of each batch that are computed in parallel; None: one per GPU, or else per core."""
    intra_op_threads: int | None = None
    """Threads within one operation; None: cores divided by shards."""
    onednn: bool | None = None
    """Use oneDNN kernels, which are faster; None: yes, unless TF_ENABLE_ONEDNN_OPTS is 0."""
    precision: str = "float32"
    """Compute the layers in float32 or bfloat16 (mixed precision); weights, loss and optimizer stay in float32."""
    deterministic: bool = True
    """Use only deterministic kernels on GPUs, which can be slower."""


# Settings that can name functions in users' files, or be Python functions.
PLUGIN_FIELDS = ("noise", "model", "loss", "metrics", "optimizer", "schedule")


# A dataclass orders fields from its last base to its first.
@dataclasses.dataclass(frozen=True)
class RunConfig(RuntimeConfig, ScheduleConfig, OptimizationConfig, ModelConfig, NoiseConfig, DataConfig):
    """The settings that decide the result of a run; saved with it as `config.json`.

    `loss`, `model`, `noise`, `metrics`, `optimizer` and `schedule` also take Python functions:
    `RunConfig(loss=my_loss)`. A configuration is canonical once it is made: the loss has one spelling, paths are
    absolute, and users' files and functions are named with the digests of their code.

    Raises UsageError for an unknown field, a value of the wrong type or out of range, and for a user's file that cannot
    be read, naming its flag.
    """

    def __new__(cls, /, *values: Any, **fields: Any) -> "RunConfig":
        """Reject unknown fields; `__init__` would raise a TypeError."""
        for name in fields:
            if name not in _field_types():
                raise UsageError(f"RunConfig: unknown field {name!r}{suggestion(name, _field_types())}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, expected in _field_types().items():
            value = getattr(self, name)
            try:
                if name in PLUGIN_FIELDS:
                    value = map_items(value, functools.partial(_recorded, name))
                object.__setattr__(self, name, _coerce(value, expected))
            except TypeError:
                problem = f"expected {inspect.formatannotation(expected)}, got {shown(value)}"
                if name == "data" and (hasattr(value, "shape") or isinstance(value, dict)):
                    problem = "expected a path; pass arrays as dae.train(RunConfig(...), data=arrays)"
                raise UsageError(f"{flag(name)}: {problem}") from None
        for name, (is_allowed, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise UsageError(f"{flag(name)}: expected {allowed}, got {shown(value)}")
        if self.warmup_ratio and self.schedule == "constant":
            raise UsageError(
                f"--warmup-ratio: {self.warmup_ratio} needs --schedule cosine, or your own that takes `warmup_ratio`"
            )
        if self.patches_per_epoch is not None and self.patch_size is None:
            raise UsageError("--patches-per-epoch: needs --patch-size")
        for name in ("noisy", "clean"):
            if self.data is not None and (folder := getattr(self, name)) is not None:
                raise UsageError(
                    f"{flag(name)}: {shown(folder)} replaces --data, which is {shown(self.data)}; give only one"
                )
        if self.only_noisy and (self.noise != "gaussian" or isinstance(self.noise_level, tuple)):
            raise UsageError("--noisy: without --clean no noise is added; --noise-level states that of the pictures")
        object.__setattr__(self, "loss", expression.canonical(self.loss))
        for name in PLUGIN_FIELDS:
            resolve = functools.partial(plugins.with_absolute_paths_and_digests, flag=flag(name))
            object.__setattr__(self, name, map_items(getattr(self, name), resolve))
        for name in PATH_FIELDS:
            if (path := getattr(self, name)) and path != PYTHON_DATA:
                object.__setattr__(self, name, os.path.abspath(path))

    @property
    def only_noisy(self) -> bool:
        """True if there are noisy pictures, and no clean ones to train on."""
        return self.noisy is not None and self.clean is None


def flag(field_name: str) -> str:
    """Return the command-line flag of a field: `noise_level` -> `--noise-level`."""
    return "--" + field_name.replace("_", "-")


@functools.cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(RunConfig)


def _recorded(name: str, value: Any) -> Any:
    """Return a value of a field of PLUGIN_FIELDS, or for a Python function the text that records it."""
    return plugins.record(value, name) if callable(value) else value


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


def _ascending(level: float | tuple[float, float]) -> bool:
    low, high = level if isinstance(level, tuple) else (level, level)
    return 0 <= low <= high < math.inf


def _ends(ends: tuple[float, float]) -> bool:
    return -1e30 <= ends[0] < ends[1] <= 1e30 and ends[1] - ends[0] >= 1e-30  # images are float32


def _sides(size: int | tuple[int, int]) -> bool:
    return all(11 <= side <= 2**15 for side in (size if isinstance(size, tuple) else (size,)))


def _integer(least: int, most: int = 2**63 - 1) -> tuple[Callable[[Any], bool], str]:
    """Return the test of an integer in [least, most], and what it allows."""
    limits = f"an integer >= {least}" if most == 2**63 - 1 else f"an integer from {least} to {most:,}"
    return lambda number: least <= number <= most, limits


_SHORT = (lambda text: len(text) <= 5_000, "at most 5,000 characters")  # so that a hostile expression is parsed at once
_POSITIVE = (lambda number: 0 < number < math.inf, "a finite number > 0")

# A test of each value that is not None, and what it allows.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (_sides, "one or two integers from 11 (the window of SSIM) to 32768"),
    "value_range": (_ends, "two finite numbers in ascending order that float32 can tell apart"),
    "patch_size": (_sides, "an integer from 11 (the window of SSIM) to 32768"),
    "patches_per_epoch": _integer(1),
    "train_examples": _integer(1),
    "validation_examples": _integer(0),
    "noise": _SHORT,
    "optimizer": _SHORT,
    "schedule": _SHORT,
    "noise_level": (_ascending, "a finite number >= 0, or two in ascending order"),
    "width": _integer(1, 1024),
    "loss": _SHORT,
    "initial_brightness": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "bce_steps": _integer(0),
    "learning_rate": _POSITIVE,
    "adam_beta_2": (lambda beta: 0 <= beta < 1, "a number in [0, 1)"),
    "max_gradient_norm": _POSITIVE,
    "ema_decay": (lambda decay: 0 < decay < 1, "a number between 0 and 1"),
    "patience": _integer(1),
    "batch_size": _integer(1, 10**6),
    "epochs": _integer(1, 10**6),
    "warmup_ratio": (lambda ratio: 0 <= ratio < 1, "a number in [0, 1)"),
    "checkpoint_every": _integer(1),
    "seed": _integer(0),
    "shards": _integer(1, 1024),
    "intra_op_threads": _integer(1, 1024),
    "precision": (
        lambda name: name in ("float32", "bfloat16"),
        "float32 or bfloat16 (which needs no loss scaling, unlike float16)",
    ),
}

# SOAP with a long warm-up, as in all presets that use it.
_SOAP = {
    "optimizer": "soap",
    "schedule": "cosine",
    "warmup_ratio": 0.3,
    "adam_beta_2": 0.99,
    "max_gradient_norm": 0.1,
    "batch_size": 64,
}

# Values of fields, by the name of a preset.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The tutorial to the letter: trains on all 60,000 images, without validation, and starts with grey outputs.
    "tutorial": {"validation_examples": 0, "initial_brightness": 0.5},
    # As good as the default in a twenty-fifth of its epochs (docs/results.md).
    "fast": {**_SOAP, "learning_rate": 0.02, "batch_size": 80, "epochs": 2},
    # More than 20 dB in a few seconds of training.
    "good": {
        **_SOAP,
        "model": "patches",
        "learning_rate": 0.01,
        "batch_size": 32,
        "train_examples": 24_000,
        "epochs": 1,
    },
    # More than 21 dB in a few minutes.
    "best": {**_SOAP, "model": "unet", "learning_rate": 0.003, "epochs": 3},
    # Photographs, grey or in colour, with Gaussian noise of unknown level, up to 55/255 (docs/pretrained.md).
    "photo": {
        **_SOAP,
        "model": "residual_unet",
        "loss": "mse",
        "bce_steps": 0,
        "noise_level": (0.0, 55 / 255),
        "clip_noise": False,
        "patch_size": 64,
        "augment": True,
        "batch_size": 16,
        "learning_rate": 0.003,
        "epochs": 30,
    },
    # A single noisy picture, from the weights of the package; 400 steps, whatever its size (docs/data.md).
    "zero_shot": {
        **_SOAP,
        "model": "residual_unet",
        "loss": "neighbor2neighbor",
        "bce_steps": 0,
        "validation_examples": 0,
        "patch_size": 64,
        "patches_per_epoch": 640,
        "augment": True,
        "batch_size": 16,
        "learning_rate": 0.001,
        "epochs": 10,
        "shards": 2,  # so that the result does not depend on the number of cores
    },
}


def preset_fields(name: str, only_noisy: bool = False) -> dict[str, Any]:
    """Return the fields of a preset; with `only_noisy`, where no noise is added, without its noise level.

    Raises UsageError if there is no such preset.
    """
    fields = lookup(PRESETS, name, "--preset")
    return {field: value for field, value in fields.items() if not (only_noisy and field == "noise_level")}


def preset(name: str, **changes: Any) -> RunConfig:
    """Return the configuration of a preset, with some fields changed. Raises UsageError if there is no such preset."""
    only_noisy = changes.get("noisy") is not None and changes.get("clean") is None
    return RunConfig(**{**preset_fields(name, only_noisy), **changes})


def spelled(field: str, value: Any, change: Callable[[Any], str]) -> str:
    """Return the flag that gives a field this value, of which `change` gives the text of each item."""
    if isinstance(value, bool):
        return flag(field if value else f"no_{field}")
    return " ".join([flag(field), *map(change, value if isinstance(value, tuple) else (value,))])


def shortest(config: RunConfig, unnamed: Collection[str] = ()) -> str:
    """Return the preset and the fewest flags that describe `config` but for its `unnamed` fields: `good --epochs 2`.

    Users' functions are described by their names alone.
    """
    texts = []
    for name, fields in PRESETS.items():
        flags = []
        for field, value in vars(config).items():
            if field not in unnamed and value != fields.get(field, getattr(RunConfig, field)):
                flags.append(spelled(field, value, lambda item: plugins.label(str(item))))
        texts.append((len(flags), " ".join([name, *flags])))
    return min(texts)[-1]


# Version of config.json; raised when the same file would no longer give the same run.
FORMAT = 6


def to_json(config: RunConfig, change: Callable[[str, str], str] = lambda name, text: text) -> str:
    """Return `config` as JSON text, one field per line.

    `change(field name, text)` gives what is written for each setting that can name users' files.
    """
    plugin_texts = {name: map_items(getattr(config, name), functools.partial(change, name)) for name in PLUGIN_FIELDS}
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config), **plugin_texts}, indent=2) + "\n"


def from_json(text: str, source: str, folder: Path = Path()) -> RunConfig:
    """Return the configuration in JSON `text`; missing fields have their defaults.

    Paths of users' files are relative to `folder`. Raises UsageError, naming `source`, for text that is not JSON, an
    unknown field, or a value of the wrong type or out of range.
    """

    def resolve_paths(value: Any) -> Any:
        return plugins.resolve_paths(value, folder) if isinstance(value, str) else value

    with as_usage_error(source, "not JSON", ValueError, RecursionError):
        fields = json.loads(text)
    with as_usage_error(source):
        if not isinstance(fields, dict):
            raise UsageError(f"expected a JSON object, got a {type(fields).__name__}")
        version = fields.pop("format", FORMAT)
        if version != FORMAT:
            raise UsageError(f"expected format {FORMAT}, got {version!r}, of another version of dae")
        for name in fields.keys() & PLUGIN_FIELDS:
            fields[name] = map_items(fields[name], resolve_paths)
        return RunConfig(**fields)


def read(path: Path) -> RunConfig:
    """Return the configuration saved at `path`. Raises UsageError if it cannot be read.

    Users' files that it names, such as a run's `code/my_losses.py`, lie relative to the file's own folder.
    """
    if path.name == "config.json" and path.parent.is_dir() and not path.exists():
        raise UsageError(f"{path.parent}: not a run's folder (it has no {path.name})")
    with as_usage_error(path, "cannot be read", OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    return from_json(text, str(path), path.parent)


def map_items(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value of a field of PLUGIN_FIELDS, an item or several, with `change` applied to each."""
    return type(value)(map(change, value)) if isinstance(value, list | tuple) else change(value)


def config_for_resume(saved: RunConfig, requested: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration that resumes the run in `run_dir`, which was started with `saved`, as `requested`.

    These may differ: more epochs at a constant learning rate; `checkpoint_every`; the paths of the data and of the
    initial weights, whose digests are checked; and those of users' files, for which the run's copies are used. Raises
    UsageError, with both values, for any other difference.
    """
    changes: dict[str, Any] = {
        name: getattr(saved, name)
        for name in PLUGIN_FIELDS
        if _without_paths(saved, name) == _without_paths(requested, name)
    }
    if saved.data == PYTHON_DATA and requested.data is None:  # the error will be that they were not passed again
        changes["data"] = PYTHON_DATA
    config = dataclasses.replace(requested, **changes)
    allowed = {"checkpoint_every"}
    allowed |= {name for name in PATH_FIELDS if None not in (getattr(saved, name), getattr(config, name))}
    if config.epochs > saved.epochs and saved.schedule == "constant":
        allowed.add("epochs")
    differences = [
        f"{flag(name)} was {getattr(saved, name)!r}, now {getattr(config, name)!r}"
        for name in _field_types()
        if name not in allowed and _without_paths(saved, name) != _without_paths(config, name)
    ]
    if differences:
        raise UsageError(
            f"--resume: {run_dir} is another run ({'; '.join(differences)}); "
            "only --epochs, with a constant learning rate, can grow, and --checkpoint-every change"
        )
    return config


def _without_paths(config: RunConfig, name: str) -> Any:
    """Return the value of a field, without the paths of the users' files that it names."""
    value = getattr(config, name)
    return map_items(value, plugins.without_paths) if name in PLUGIN_FIELDS else value
