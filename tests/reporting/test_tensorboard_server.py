"""A real TensorBoard server on a real run, asked over HTTP as its web page asks it.

test_tensorboard.py tests the content faster, in the files that the server reads.
"""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorflow as tf

from dae.reporting import tensorboard
from dae.workdir.workdir import read_metrics, read_report

pytestmark = pytest.mark.slow

Get = Callable[..., Any]


@pytest.fixture(scope="module")
def get(tiny_run) -> Iterator[Get]:
    """A function that asks a TensorBoard on `tiny_run` for a path below /data."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0", "--logdir"]
    process = subprocess.Popen([*command, str(tiny_run)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(line for line in process.stderr if " at http://" in line).split(" at ")[1].split()[0]

        def get(path: str, **query: object) -> Any:
            with urllib.request.urlopen(f"{url}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
                content = answer.read()
            return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content

        for _ in range(100):  # it answers before it has read all files
            if all_enabled(get) and len(get("runs")) == 4:
                break
            time.sleep(0.2)
        yield get
    finally:
        process.kill()
        process.communicate()


def all_enabled(get: Get) -> bool:
    """Return whether every plugin has found data."""
    listing = get("plugins_listing")
    tabs = "scalars timeseries images histograms distributions graphs text hparams"
    return all(listing[name]["enabled"] for name in tabs.split())


def test_every_plugin_is_enabled_and_every_writer_is_a_run(get):
    assert all_enabled(get)
    assert sorted(get("runs")) == ["tensorboard", *(f"tensorboard/{name}" for name in ("test", "train", "validation"))]


@pytest.mark.parametrize("writer", ["train", "validation", "test"])
def test_scalars_have_one_value_per_epoch_and_a_description(get, writer, tiny_run):
    report, lines = read_report(tiny_run), read_metrics(tiny_run)
    name, tags = f"tensorboard/{writer}", tensorboard.scalars({**lines[0], **report}, writer)
    found = get("plugin/scalars/tags")[name]
    assert set(found) == set(tags)
    for tag, about in found.items():
        assert about["description"]
        steps = [step for _, step, _ in get("plugin/scalars/scalars", run=name, tag=tag)]
        assert steps == ([report["epoch"]] if writer == "test" else [1, 2, 3]), tag


def test_images_histograms_graph_texts_and_settings_are_served(get):
    train, validation = "tensorboard/train", "tensorboard/validation"
    tag = "images/noisy_denoised_clean_error"
    pictures = get("plugin/images/images", run=validation, tag=tag, sample=0)
    assert [picture["step"] for picture in pictures] == [1, 2, 3]
    png = get("plugin/images/individualImage", **dict(urllib.parse.parse_qsl(pictures[0]["query"])))
    assert tf.io.decode_png(png).shape == (8 * 30, 4 * 30, 1)
    histograms = get("plugin/histograms/histograms", run=validation, tag="latents/encoder")
    assert sum(count for *_, count in histograms[-1][2]) == 256 * 4 * 4 * 8
    assert b"Conv2DBackpropFilter" in get("plugin/graphs/graph", run=train, limit_attr_size=1024, large_attrs_key="_")
    (text,) = get("plugin/text/text", run=train, tag="run/configuration")
    assert "batch_size" in text["text"]
    request = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_UNKNOWN"]}
    (group,) = get("plugin/hparams/session_groups", request=json.dumps(request))["sessionGroups"]
    assert group["hparams"]["loss"] == "bce"
