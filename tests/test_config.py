import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st

from dae import cli
from dae import config as config_module
from dae.config import RunConfig, flag
from dae.errors import UsageError

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
TERMS = st.lists(
    st.sampled_from(["bce", "mse", "my_loss", f"/my dir/my losses.py:f@{'1' * 64}", f"/a+b/c.py:g@{'0' * 64}"]),
    min_size=1,
    unique=True,
)
CONFIGS = st.builds(
    RunConfig,
    dataset=st.text(),
    data=st.none() | st.text(),
    image_size=st.none() | st.integers(11, 2**15) | st.tuples(st.integers(11, 2**15), st.integers(11, 2**15)),
    noise_level=st.floats(0, 1e6) | st.tuples(st.floats(0, 1), st.floats(1, 1e6)),
    loss=st.builds(
        lambda names, weight: " + ".join([names[0], *(f"{weight}*{name}" for name in names[1:])]),
        TERMS,
        st.floats(1e-9, 1e9),
    ),
    learning_rate=st.floats(1e-12, 1e3),
    schedule=st.just("cosine"),
    warmup_ratio=st.floats(0, 1, exclude_max=True),
    shards=st.none() | st.integers(1, 1024),
    onednn=st.none() | st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(CONFIGS)
def test_json_round_trip_returns_an_equal_config(config):
    assert config_module.from_json(config_module.to_json(config), "here") == config


@fuzz
@given(st.text() | (JSON_VALUES | st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES)).map(json.dumps))
def test_any_text_is_a_valid_config_or_rejected_with_its_source(text):
    try:
        config = config_module.from_json(text, "here.json")
    except UsageError as error:
        assert str(error).startswith("here.json: ")
        assert "\n" not in str(error)
    else:
        assert config_module.from_json(config_module.to_json(config), "again") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise_level": -0.1}, "--noise-level: .* got -0.1$"),
        ({"noise_level": (0.8, 0.1)}, r"--noise-level: .*ascending.* got \(0.8, 0.1\)$"),
        ({"noise_level": (0.1, math.nan)}, "--noise-level: .* nan"),
        ({"image_size": (28, 10)}, r"--image-size: .*\b11\b.* got \(28, 10\)$"),
        ({"learning_rate": math.nan}, "--learning-rate: .* got nan$"),
        ({"seed": -1}, "--seed: .* got -1$"),
        ({"seed": 2**63}, "--seed: .* got 9223372036854775808$"),
        ({"initial_brightness": 0.0}, "--initial-brightness: .* got 0.0$"),
        ({"bce_steps": -1}, "--bce-steps: .* got -1$"),
        ({"loss": "bce +* mse"}, "--loss: .*'bce \\+\\* mse'"),
        ({"loss": "a" * 5001}, "--loss: .*5,000"),
        ({"epochs": 2.5}, "--epochs: .*int.* got 2.5$"),
        ({"epochs": True}, "--epochs: .*int.* got True$"),
        ({"clip_noise": 1}, "--clip-noise: .*bool.* got 1$"),
        ({"loss": 3}, "--loss: expected str, got 3$"),
        ({"loss": [json.dumps]}, r"--loss: expected str, got \['python:dumps@"),
        ({"data": np.zeros((2, 28, 28))}, r"--data: expected a path; .* dae.train\(RunConfig\(...\), data=arrays\)$"),
        ({"metrics": json.dumps}, r"--metrics: expected tuple\[str, ...\], got 'python:dumps@"),
        ({"metrics": [json.dumps, 3]}, r"--metrics: expected tuple\[str, ...\], got \['python:dumps@.*', 3\]$"),
        ({"noise_level": [0.5, "x"]}, r"--noise-level: .*float.* got \[0.5, 'x'\]$"),
        ({"noise_level": (0.1, 0.2, 0.3)}, r"--noise-level: .*float.* got \(0.1, 0.2, 0.3\)$"),
        ({"epochs": 10**5000}, r"--epochs: .* got a value of the type int$"),
        ({"image_size": [28, 28.5]}, r"--image-size: .*int.* got \[28, 28.5\]$"),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_rejected_by_flag_and_value(values: dict[str, Any], message):
    with pytest.raises(UsageError, match=f"^{message}"):
        RunConfig(**values)


NUMBERS = st.booleans() | st.integers() | st.just(10**5000) | st.floats() | st.sampled_from([0, 1, 28, 0.5, 2.5])
ARRAYS = st.builds(
    lambda numbers, dtype: np.array(numbers, dtype),
    st.integers(0, 100) | st.lists(st.integers(0, 100), min_size=1, max_size=1) | st.tuples(*[st.integers(0, 100)] * 3),
    st.sampled_from(["bool", "int32", "uint8", "float32", "float64", "str", "object"]),
)
ITEMS = st.none() | NUMBERS | ARRAYS | st.text() | st.binary() | st.sampled_from([len, lambda: 0, RunConfig, object()])
VALUES = JSON_VALUES | ITEMS | st.lists(ITEMS, max_size=3) | st.lists(ITEMS, max_size=3).map(tuple)


@pytest.mark.parametrize("field", FIELDS)
@fuzz
@given(VALUES)
def test_any_value_of_a_field_is_accepted_or_rejected_by_its_flag(field, value):
    try:
        config = RunConfig(**{field: value})
    except UsageError as error:
        assert str(error).startswith(f"{flag(field)}: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 500
    else:
        assert config_module.from_json(config_module.to_json(config), "x") == config
        assert hash(config) == hash(dataclasses.replace(config))  # no list or other mutable value is kept


def test_an_unknown_field_is_rejected_with_a_suggestion():
    values: dict[str, Any] = {"epoch": 3}
    message = "^RunConfig: unknown field 'epoch'; did you mean 'epochs'[?]$"
    for make in (RunConfig, lambda **values: dataclasses.replace(RunConfig(), **values)):
        with pytest.raises(UsageError, match=message):
            make(**values)
    for name in ("cls", "self", "values"):
        values = {name: 1}
        with pytest.raises(UsageError, match=f"unknown field '{name}'"):
            RunConfig(**values)


def test_a_configuration_is_canonical_once_it_is_made(tmp_path, monkeypatch):
    """One spelling of a loss, absolute paths, and digests of users' files, at that time."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "other.py"):
        Path(name).write_text("def f(clean, denoised): ...\n")
    values: dict[str, Any] = {
        "loss": "1*mse+.1 * mine.py:f",
        "metrics": ["mine.py:f"],
        "data": "images",
        "start_from": "a",
    }
    config = RunConfig(**values)
    digest = hashlib.sha256(Path("mine.py").read_bytes()).hexdigest()
    assert config.loss == f"mse + 0.1*{tmp_path}/mine.py:f@{digest}"
    assert config.metrics == (f"{tmp_path}/mine.py:f@{digest}",)
    assert (config.data, config.start_from) == (f"{tmp_path}/images", f"{tmp_path}/a")
    assert RunConfig(data=config_module.PYTHON_DATA).data == config_module.PYTHON_DATA
    Path("mine.py").write_text("changed")
    assert dataclasses.replace(config, epochs=3).loss == config.loss
    monkeypatch.chdir("/")
    assert config_module.from_json(config_module.to_json(config), "x") == config
    relative = json.loads(config_module.to_json(config)) | {"loss": "code/mine.py:f"}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text("mine")
    (tmp_path / "config.json").write_text(json.dumps(relative))
    assert config_module.read(tmp_path / "config.json").loss.startswith(f"{tmp_path}/code/mine.py:f@")
    for field in ("loss", "model", "noise"):
        values = {field: "none.py:f"}
        with pytest.raises(UsageError, match=rf"^{flag(field)}: /none\.py: cannot be read \(no such file\)$"):
            RunConfig(**values)


def test_a_configuration_can_be_copied_and_pickled():
    config = RunConfig(epochs=3, metrics=(f"/a.py:f@{'0' * 64}",))
    assert copy.deepcopy(config) == copy.copy(config) == pickle.loads(pickle.dumps(config)) == config


def test_numpy_scalars_become_python_numbers_ints_become_floats_and_lists_become_tuples():
    values: dict[str, Any] = {"epochs": np.int64(3), "learning_rate": np.float32(0.5), "clip_noise": np.bool_(False)}
    config = RunConfig(**values)
    assert config == RunConfig(epochs=3, learning_rate=0.5, clip_noise=False)
    assert config_module.from_json(config_module.to_json(config), "x") == config
    config = RunConfig(noise_level=[0, 1], image_size=[28, 32], learning_rate=1)  # type: ignore[arg-type]
    assert config == RunConfig(noise_level=(0.0, 1.0), image_size=(28, 32), learning_rate=1.0)
    assert repr((config.noise_level, config.image_size, config.learning_rate)) == "((0.0, 1.0), (28, 32), 1.0)"
    assert repr(RunConfig(noise_level=1).noise_level) == "1.0"
    assert config_module.from_json('{"noise_level": [0, 1]}', "x") == RunConfig(noise_level=(0.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "list"),
        ("[" * 100_000, "JSON"),
        ('{"epoch": 3}', "'epoch'; did you mean 'epochs'[?]"),
        ('{"epochs": "3"}', "--epochs: .*int.*'3'"),
        ('{"format": 7}', "format 6, got 7"),
        ('{"format": "2"}', "format 6, got '2'"),
        ('{"noise_level": 1e999}', "--noise-level: .*inf"),
    ],
)
def test_an_invalid_config_file_is_rejected_with_the_reason(text, message):
    with pytest.raises(UsageError, match=f"^x.json: .*{message}"):
        config_module.from_json(text, "x.json")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UsageError, match=rf"^{tmp_path}: not a run's folder \(it has no config\.json\)$"):
        config_module.read(tmp_path / "config.json")


def test_a_resume_may_change_only_epochs_checkpoint_every_and_the_paths_of_what_has_a_digest(tmp_path):
    (tmp_path / "mine.py").write_text("def f(clean, denoised): ...\n")
    (tmp_path / "moved.py").write_text("def f(clean, denoised): ...\n")
    values: dict[str, Any] = {"epochs": 3, "data": "a", "start_from": "b", "loss": f"{tmp_path}/mine.py:f"}
    saved = RunConfig(**values)

    def resume(**changes: Any) -> RunConfig:
        return config_module.config_for_resume(saved, RunConfig(**{**values, **changes}), tmp_path)

    assert resume() == saved
    assert resume(loss=f"1*{tmp_path}/moved.py:f") == saved  # the run's own copy is used
    assert resume(data="c", start_from="d") == RunConfig(**{**values, "data": "c", "start_from": "d"})
    assert resume(epochs=4, checkpoint_every=10) == dataclasses.replace(saved, epochs=4, checkpoint_every=10)
    for changes, words in (
        ({"data": None}, rf"--data was '{os.getcwd()}/a', now None"),
        ({"start_from": None}, rf"--start-from was '{os.getcwd()}/b', now None"),
        ({"epochs": 2}, "--epochs was 3, now 2"),
        ({"noise_level": 0.3, "seed": 7}, "--noise-level was None, now 0.3; --seed was 0, now 7"),
        ({"intra_op_threads": 4}, "--intra-op-threads was None, now 4"),
        ({"loss": "bce"}, r"--loss was '.*/mine\.py:f@.*', now 'bce'"),
    ):
        with pytest.raises(UsageError, match=rf"^--resume: {tmp_path} is another run \({words}\); only --epochs"):
            resume(**changes)
    saved, moved = RunConfig(noisy="a", clean="b"), RunConfig(noisy="c", clean="d")
    assert config_module.config_for_resume(saved, moved, tmp_path) == moved
    for before, now, words in (
        (saved, RunConfig(clean="d"), r"--noisy was '.*/a', now None"),
        (RunConfig(epochs=3, schedule="cosine"), RunConfig(epochs=4, schedule="cosine"), "--epochs was 3, now 4"),
    ):
        with pytest.raises(UsageError, match=words):
            config_module.config_for_resume(before, now, tmp_path)


def test_the_shortest_description_is_a_command_line():
    config = config_module.preset("photo", augment=False, clip_noise=True, noise_level=(0.0, 0.1))
    text = config_module.shortest(config)
    assert text == "photo --no-augment --noise-level 0.0 0.1 --clip-noise"
    assert cli.parse_config(cli.RunArguments, ["--preset", *text.split()]).config == config
