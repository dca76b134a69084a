"""The record of what a run derives: written, read, used again, and compared."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import EIGHT_BITS, rejected, run_in_process
from runs import config_of

from dae import cli, resolved
from dae import config as config_module
from dae.config import RunConfig
from dae.errors import UsageError
from dae.resolved import Resolved
from dae.training.task import prepare
from dae.workdir.workdir import read_metrics, read_report

RESOLVED = Resolved((0.1, 0.5), 0.13, (16, 16, 1), EIGHT_BITS, 40, 2, 1, True, "a" * 64, "")


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / resolved.FILE).write_text(resolved.to_json(RESOLVED))
    assert resolved.read(tmp_path) == RESOLVED


FIELDS = dataclasses.asdict(RESOLVED)
WRONG: dict[str, list[Any]] = {
    "noise_level": [0.5, [0.5], [0.1, "x"], None],
    "initial_brightness": [None, "0.5"],
    "image_shape": [None, [28, 28], [28, 28, "x"]],
    "value_range": [None, [0, 1], {"black": 0.0, "white": 1.0}],
    "validation_examples": [None, "1", 2.5],
    "shards": ["2", True],
    "intra_op_threads": [None],
    "onednn": [None, 1],
    "data_digest": [None],
    "weights_digest": [None, 3],
    "another": [1],
}
DAMAGED = ["", "{", "[]", "{}"]
DAMAGED += [json.dumps({**FIELDS, name: value}) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize("text", [None, *DAMAGED])
def test_a_missing_or_damaged_record_is_rejected_in_one_line(text, tmp_path):
    if text is not None:
        (tmp_path / resolved.FILE).write_text(text)
    with rejected(f"{tmp_path}/resolved.json: missing or damaged; "):
        resolved.read(tmp_path)


def test_a_run_records_what_it_derives_and_leaves_the_requests_as_they_are(finished_run, files):
    run = finished_run("network")
    config, derived = config_module.read(run / "config.json"), resolved.read(run)
    assert config == replace(
        config_of(files, "network"), model=config.model, metrics=config.metrics
    )  # whose copies are in code/
    assert (config.shards, config.initial_brightness, config.onednn) == (None, None, None)
    assert derived.noise_level == (0.01, 0.5)
    assert derived.validation_examples == 40
    # Batch normalization, and a loss with a method `update`, see whole batches.
    assert derived.shards == prepare(config_of(files, "sum")).resolved.shards == 1
    assert 0.05 < derived.initial_brightness < 0.5
    assert (len(derived.data_digest), derived.weights_digest) == (64, "")


def parse(*arguments: object) -> cli.RunArguments:
    return cli.parse_config(cli.RunArguments, list(map(str, arguments)))


def test_a_repeated_or_resumed_run_uses_the_record_beside_its_configuration(finished_run, tmp_path):
    run = finished_run("network")
    derived = replace(resolved.read(run), weights_digest="e" * 64)
    run = Path(shutil.copytree(run, tmp_path / "run"))
    (run / resolved.FILE).write_text(resolved.to_json(derived))
    assert parse().recorded is None
    assert parse("--run-dir", run, "--preset", "fast").recorded is None
    for arguments in (("--config", run / "config.json"), ("--run-dir", run, "--resume")):
        assert parse(*arguments).recorded == derived
        assert parse(*arguments, "--learning-rate", 0.1).recorded == derived
        assert parse(*arguments).onednn == derived.onednn
        assert parse(*arguments, "--onednn", False).onednn is False
    # Digests of what a flag changes are not compared.
    arguments = "--config", run / "config.json"
    assert parse(*arguments, "--data", "other.npz").recorded == replace(derived, data_digest="")
    assert parse(*arguments, "--start-from", "other.keras").recorded == replace(derived, weights_digest="")
    (run / resolved.FILE).write_text("{}")
    with pytest.raises(UsageError, match="missing or damaged"):
        assert parse(*arguments).recorded
    (run / resolved.FILE).unlink()
    assert parse(*arguments).recorded is None


def test_other_images_and_weights_than_the_recorded_ones_are_rejected(files):
    config = config_of(files, "start_from")
    recorded = prepare(config).resolved
    assert len(recorded.weights_digest) == 64
    with pytest.raises(UsageError, match=r"^--data: .*/digits\.npz: the images differ .*expected SHA-256 bbb"):
        prepare(config, recorded=replace(recorded, data_digest="b" * 64))
    with pytest.raises(UsageError, match=r"^--start-from: .*/start\.keras: the weights differ .*SHA-256 ccc"):
        prepare(config, recorded=replace(recorded, weights_digest="c" * 64))
    changes = {"data": "{}/pairs", "image_size": 16, "value_range": (0, 4095), "validation_examples": None}
    other = config_of(files, "start_from", **changes, noise_level=0.1)
    assert prepare(other, recorded=replace(recorded, data_digest="", weights_digest="")).resolved.data_digest


def test_run_py_builds_one_configuration_and_repeats_a_run_only_with_the_same_images(files, tmp_path, monkeypatch):
    """The run is quiet and validates on no images, so that it keeps its last epoch."""

    def count(self: RunConfig) -> None:
        built.append(self)
        check(self)

    built: list[RunConfig] = []
    check, run = RunConfig.__post_init__, tmp_path / "run"
    data = ("--data", files / "digits.npz", "--validation-examples", 0, "--batch-size", 64)
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "__post_init__", count)
        network = ("--model", f"{files}/networks.py:plain")
        done = run_in_process("run.py", *data, *network, "--epochs", 1, "--quiet", "--run-dir", run)
    assert (done.stdout, done.stderr) == ("", "")
    assert len(built) == 1
    assert read_report(run)["epoch"] == 1
    assert not any(name.startswith("validation") for name in read_metrics(run)[0])
    assert not (run / "tensorboard" / "validation").exists()
    assert not (run / "checkpoints" / "best").exists()
    changed = json.loads((run / resolved.FILE).read_text()) | {"data_digest": "d" * 64}
    (run / resolved.FILE).write_text(json.dumps(changed))
    done = run_in_process("run.py", "--config", run / "config.json", "--run-dir", "again", cwd=tmp_path, status=2)
    assert "digits.npz: the images differ from those the run was made with" in done.stderr
    assert not (tmp_path / "again").exists()
