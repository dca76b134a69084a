import dataclasses
import json
import math

import pytest
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

from dae import config as configs
from dae.config import RunConfig
from dae.errors import UsageError

CONFIGS = st.builds(
    RunConfig,
    dataset=st.text(),
    data=st.none() | st.text(),
    train_examples=st.none() | st.integers(1, 10**9),
    validation_examples=st.none() | st.integers(0, 10**9),
    image_size=st.none() | st.integers(11, 2**15) | st.tuples(st.integers(11, 2**15), st.integers(11, 2**15)),
    noise_level=st.floats(0, 1e6) | st.tuples(st.floats(0, 1), st.floats(1, 1e6)),
    clip_noise=st.booleans(),
    loss=st.text(),
    width=st.integers(1, 1024),
    learning_rate=st.floats(1e-12, 1e3),
    schedule=st.just("cosine"),
    warmup_ratio=st.floats(0, 1, exclude_max=True),
    micro_batches=st.none() | st.integers(1, 1024),
    batch_size=st.integers(1, 10**6),
    epochs=st.integers(1, 10**6),
    checkpoint_every=st.none() | st.integers(1, 10**9),
    intra_op_threads=st.none() | st.integers(1, 1024),
    onednn=st.none() | st.booleans(),
    data_digest=st.none() | st.text(),
    seed=st.integers(0, 2**63 - 1),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(CONFIGS)
def test_json_gives_back_the_same_configuration(config):
    assert configs.from_json(configs.to_json(config), "here") == config


@fuzz
@given(JSON_VALUES | st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(RunConfig)]), JSON_VALUES))
def test_any_json_is_a_valid_configuration_or_refused_with_its_source(value):
    try:
        config = configs.from_json(json.dumps(value), "here.json")
    except UsageError as error:
        assert str(error).startswith("here.json: ")
        assert "\n" not in str(error)
    else:
        assert configs.from_json(configs.to_json(config), "again") == config


@fuzz
@given(st.text())
def test_any_text_is_a_valid_configuration_or_refused(text):
    try:
        configs.from_json(text, "here.json")
    except UsageError as error:
        assert str(error).startswith("here.json: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs: 0 is not a whole number from 1"),
        ({"noise_level": -0.1}, "--noise-level: -0.1 is not"),
        ({"noise_level": (0.8, 0.1)}, r"--noise-level: \(0.8, 0.1\) is not .* the lower first"),
        ({"noise_level": (0.1, math.nan)}, "--noise-level: .* is not"),
        ({"image_size": (28, 10)}, r"--image-size: \(28, 10\) is not"),
        ({"learning_rate": math.nan}, "--learning-rate: nan is not"),
        ({"batch_size": 0}, "--batch-size: 0 is not"),
        ({"seed": -1}, "--seed: -1 is not"),
        ({"validation_examples": -5}, "--validation-examples: -5 is not"),
    ],
)
def test_values_out_of_range_are_refused_by_flag_and_value(values, message):
    with pytest.raises(UsageError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"epoch": 3}', "unknown field 'epoch'; did you mean 'epochs'?"),
        ('{"epochs": "3"}', "epochs is '3', which is not of type int"),
        ('{"epochs": true}', "epochs is True"),
        ('{"format": 2}', "has format 2, of a newer version"),
        ('{"noise_level": 1e999}', "--noise-level: inf"),
        ('{"noise_level": [0.1]}', r"noise_level is \[0.1\], which is not of type float or \[float, float\]"),
        ('{"noise_level": [0.1, "x"]}', "which is not of type float or"),
        ('{"noise_level": [0.5, 0.1]}', "the lower first"),
    ],
)
def test_a_broken_config_file_is_refused_with_the_reason(text, message):
    with pytest.raises(UsageError, match=f"x.json: .*{message}".replace("?", r"\?")):
        configs.from_json(text, "x.json")


def test_levels_of_json_are_those_of_python():
    assert configs.from_json('{"noise_level": 1}', "x").noise_level == 1.0
    assert configs.from_json('{"noise_level": [0, 1]}', "x") == RunConfig(noise_level=(0.0, 1.0))


def test_a_resume_may_ask_for_more_epochs_and_other_checkpoints_and_nothing_else(tmp_path):
    saved = RunConfig(epochs=3, intra_op_threads=2, onednn=True, data_digest="x")
    asked = RunConfig(epochs=4, checkpoint_every=10)
    assert configs.resuming(saved, asked, tmp_path) == dataclasses.replace(saved, epochs=4, checkpoint_every=10)
    with pytest.raises(UsageError, match="--epochs was 3, now 2"):
        configs.resuming(saved, RunConfig(epochs=2), tmp_path)
    with pytest.raises(UsageError, match=r"--noise-level was 0.5, now 0.3; --seed was 0, now 7"):
        configs.resuming(saved, RunConfig(epochs=3, noise_level=0.3, seed=7), tmp_path)
    with pytest.raises(UsageError, match=r"--intra-op-threads was 2, now 4"):
        configs.resuming(saved, RunConfig(epochs=3, intra_op_threads=4), tmp_path)
