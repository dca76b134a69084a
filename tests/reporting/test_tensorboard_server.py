"""A real TensorBoard server on real runs, asked over HTTP as its web page asks it.

test_tensorboard.py tests the same content faster, in the files that the server reads.
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS

from dae import config as config_module
from dae.data import datasets
from dae.training import checkpoints, trainer
from dae.workdir.workdir import read_metrics

pytestmark = pytest.mark.slow

EPOCHS = [1, 2, 3]
QUALITY = {"loss/total"} | {f"quality/{name}" for name in ("bce", "bce_excess", "mse", "psnr", "ssim", "accuracy")}
OPTIMIZER = {f"optimizer/{name}" for name in ("learning_rate", "gradient_norm", "update_to_weight_ratio")}
SCALARS = {"train": QUALITY | OPTIMIZER | {"speed/images_per_second"}, "validation": QUALITY, "test": QUALITY}
TERMS = {"loss/bce", "loss/ssim"}
LAYERS = [f"{part}_conv_{number}" for part in ("encoder", "decoder") for number in (1, 2, 3)] + ["denoised"]

Get = Callable[..., Any]


@pytest.fixture(scope="module")
def logdir(tiny_run, tmp_path_factory) -> Path:
    """Two finished runs: `normal`, and `killed`, which minimizes a sum, was killed in its second epoch and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_run, folder / "normal")
    run = folder / "killed"
    # The recorded threads, which are those of this process.
    config = replace(config_module.read(tiny_run / "config.json"), loss="bce + 0.1*ssim", batch_size=2)
    (folder / "killed.json").write_text(config_module.to_json(config))
    # A checkpoint after each of its 900 steps makes the run last much longer than the resume without them.
    command = [sys.executable, EXPERIMENTS / "run.py", "--config", folder / "killed.json", "--run-dir", run]
    process = subprocess.Popen([*command, "--checkpoint-every", "1"], stdout=subprocess.DEVNULL)
    while latest_step(run) <= 310:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 310 < latest_step(run) < 600
    assert len(read_metrics(run)) == 1
    trainer.train(config, run, resume=True)
    return folder


def latest_step(run: Path) -> int:
    """Return the step of the latest checkpoint of a run, 0 if there is none."""
    prefixes = checkpoints.saved_in(run / "checkpoints" / "latest")
    return int(prefixes[-1].name.removeprefix("ckpt-")) if prefixes else 0


@pytest.fixture(scope="module")
def get(logdir) -> Iterator[Get]:
    """A function that asks a running TensorBoard for a path below /data."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(line for line in process.stderr if " at http://" in line).split(" at ")[1].split()[0]

        def get(path: str, **query: object) -> Any:
            with urllib.request.urlopen(f"{url}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
                content = answer.read()
            return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

        for _ in range(100):  # it answers before it has read all files
            if active(get) and len(get("runs")) == 8:
                break
            time.sleep(0.2)
        yield get
    finally:
        process.kill()
        process.communicate()


def active(get: Get) -> bool:
    """Return whether every plugin has found data."""
    listing = get("plugins_listing")
    tabs = "scalars timeseries images histograms distributions graphs text hparams projector"
    return all(listing[name]["enabled"] for name in tabs.split())


def test_every_plugin_is_active_and_every_run_listed(get):
    assert active(get)
    parts = ("", "/test", "/train", "/validation")
    assert sorted(get("runs")) == [f"{run}/tensorboard{part}" for run in ("killed", "normal") for part in parts]


@pytest.mark.parametrize("run", ["normal", "killed"])
def test_scalars_have_one_value_per_epoch_and_a_description(get, run, logdir):
    listed = get("plugin/scalars/tags")
    report = json.loads((logdir / run / "report.json").read_text())
    for part, tags in SCALARS.items():
        name = f"{run}/tensorboard/{part}"
        assert set(listed[name]) == tags | (TERMS if run == "killed" else set())
        for tag, about in listed[name].items():
            assert about["description"]
            steps = [step for _, step, _ in get("plugin/scalars/scalars", run=name, tag=tag)]
            assert steps == ([report["epoch"]] if part == "test" else EPOCHS), tag


@pytest.mark.parametrize("run", ["normal", "killed"])
def test_images_and_histograms_have_one_value_per_epoch(get, run):
    shown, tag = f"{run}/tensorboard/validation", "images/noisy_denoised_clean_error"
    (about,) = get("plugin/images/tags")[shown].values()
    assert about["samples"] == 1
    pictures = get("plugin/images/images", run=shown, tag=tag, sample=0)
    assert [picture["step"] for picture in pictures] == EPOCHS
    png = get("plugin/images/individualImage", **dict(urllib.parse.parse_qsl(pictures[0]["query"])))
    assert tf.io.decode_png(png).shape == (8 * 30, 4 * 30, 1)
    train, listed = f"{run}/tensorboard/train", get("plugin/histograms/tags")
    weights = {f"weights/{layer}/{kind}" for layer in LAYERS for kind in ("kernel", "bias")}
    assert set(listed[train]) == weights
    assert set(listed[shown]) == {"latents/encoder"}
    for name, tag in [(train, tag) for tag in weights] + [(shown, "latents/encoder")]:
        assert listed[name][tag]["description"]
        histograms = get("plugin/histograms/histograms", run=name, tag=tag)
        assert [step for _, step, _ in histograms] == EPOCHS
    assert sum(count for *_, count in histograms[-1][2]) == 256 * 4 * 4 * 8


@pytest.mark.parametrize("run", ["normal", "killed"])
def test_graph_and_texts_are_shown_once_at_step_0(get, run):
    train = f"{run}/tensorboard/train"
    assert get("plugin/graphs/info")[train]["run_graph"]
    assert b"Conv2DBackpropFilter" in get("plugin/graphs/graph", run=train, limit_attr_size=1024, large_attrs_key="_")
    assert set(get("plugin/text/tags")[train]) == {"run/configuration", "run/layers", "run/environment"}
    for tag, expected in (("configuration", "batch_size"), ("layers", "MaxPooling2D"), ("environment", "tensorflow")):
        (text,) = get("plugin/text/text", run=train, tag=f"run/{tag}")
        assert text["step"] == 0
        assert expected in text["text"]


def test_hparams_shows_each_run_once(get, logdir):
    request = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_UNKNOWN"]}
    groups = get("plugin/hparams/session_groups", request=json.dumps(request))["sessionGroups"]
    assert sorted(group["hparams"]["loss"] for group in groups) == ["bce", "bce + 0.1*ssim"]
    assert f"killed ({logdir})" in [group["name"] for group in groups]
    for group in groups:
        names = {(value["name"]["group"], value["name"]["tag"]) for value in group["metricValues"]}
        assert names >= {("test", "quality/psnr"), ("validation", "quality/ssim"), ("train", "loss/total")}


@pytest.mark.parametrize("run", ["normal", "killed"])
def test_the_projector_shows_latents_with_labels_and_images(get, run, mnist):
    name = f"{run}/tensorboard"
    assert name in get("plugin/projector/runs")
    (shown,) = get("plugin/projector/info", run=name)["embeddings"]
    assert shown["tensorShape"] == [256, 128]
    labels = get("plugin/projector/metadata", run=name, name="latents").decode().split()
    with np.load(datasets.MNIST_FILE) as arrays:
        assert labels == [str(label) for label in arrays["y_train"][-256:]]
    sprite = tf.io.decode_png(get("plugin/projector/sprite_image", run=name, name="latents")).numpy()
    assert sprite.shape == (16 * 28, 16 * 28, 3)
    assert (sprite[28:56, :28, 0] == mnist.validation.pixels[-256 + 16, :, :, 0]).all()
