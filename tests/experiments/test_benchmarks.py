"""Each script in experiments/benchmarks/, on few images."""

import importlib
import importlib.util
import json
import math
import shutil

import keras
import numpy as np
import pytest
from helpers import EXPERIMENTS, run_in_process, run_subprocess

from dae.config import RunConfig
from dae.errors import UsageError
from dae.models import networks
from dae.workdir.model_files import load_model

pytestmark = pytest.mark.slow


def test_benchmark_reports_the_ratio_to_fit_and_fails_if_it_is_less_than_required(tmp_path):
    arguments = ("--only", "fit", "dae", "--rounds", 1, "--train-examples", 640, "--output", "out", "--require", 1000)
    done = run_subprocess("benchmarks/benchmark.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "--require: expected 1000.0" in done.stderr
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())["results"]
    assert set(results) == {"fit", "dae"}
    seconds = {name: result["seconds"][0] for name, result in results.items()}
    assert results["dae"]["ratio_to_fit"] == pytest.approx(seconds["fit"] / seconds["dae"])
    assert f"| {results['dae']['ratio_to_fit']:.2f} |" in (tmp_path / "out" / "benchmark.md").read_text()
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", ["step_alone", "pipeline_alone", "5 steps per call"])
def test_benchmark_times_the_train_step_and_the_pipeline(program, scripts):
    from benchmark import time_in_turn

    timed = time_in_turn([program], RunConfig(train_examples=640, epochs=3), rounds=1)
    assert timed[program]["seconds"][0] > 0


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts, from which they import each other."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))


def test_benchmark_compares_the_frameworks_with_each_network(scripts, monkeypatch, tmp_path):
    import benchmark

    monkeypatch.setattr(networks, "MODELS", {name: networks.MODELS[name] for name in ("conv", "patches")})
    only = ("fit", "dae", "PyTorch eager")
    benchmark.models(benchmark.BenchmarkArguments(str(tmp_path), only=only, rounds=1, train_examples=256))
    results = json.loads((tmp_path / "benchmark.json").read_text())["models"]
    head, _, *lines = (tmp_path / "benchmark.md").read_text().splitlines()
    for line, (name, parameters) in zip(lines, {"conv": 4_385, "patches": 38_689}.items(), strict=True):
        speeds = results[name]["images_per_second"]
        assert line.startswith(f"| {name} | {parameters:,} | {speeds['dae']:,.0f} | {speeds['fit']:,.0f} |")
        assert line.endswith(f"| {speeds['dae'] / speeds['fit']:.2f} |")
        assert line.count("|") == head.count("|")
    if "PyTorch eager, images/s" in head:
        assert f"| {speeds['dae'] / speeds['PyTorch eager']:.2f} |" in line


@pytest.fixture
def frameworks(scripts):
    return importlib.import_module("frameworks")


@pytest.mark.parametrize("image_shape", [(28, 28, 1), (27, 30, 3)])
@pytest.mark.parametrize("name", networks.MODELS)
def test_the_pytorch_network_computes_the_same_as_the_keras_network(name, image_shape, frameworks):
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    model = networks.build(RunConfig(model=name), image_shape)
    random = np.random.default_rng(1)
    for weight in model.weights:  # so that biases and the statistics of batches matter
        weight.assign(weight + random.uniform(0, 0.1, weight.shape))
    translated = frameworks.torch_network(model).eval()
    assert sum(weights.numel() for weights in translated.parameters()) == sum(
        math.prod(weight.shape) for weight in model.trainable_weights
    )
    images = random.random((3, *image_shape), np.float32)
    with torch.no_grad():
        denoised = torch.sigmoid(translated(torch.from_numpy(images.transpose(0, 3, 1, 2)))).numpy()
    np.testing.assert_allclose(denoised.transpose(0, 2, 3, 1), model(images, training=False), atol=1e-4)


def test_concatenations_are_translated_to_pytorch(frameworks):
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    noisy = keras.Input((28, 28, 1))
    small = keras.layers.MaxPooling2D(2)(keras.layers.Conv2D(2, 3, padding="same")(noisy))
    both = keras.layers.Concatenate()([noisy, keras.layers.UpSampling2D(2)(small)])
    model = keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")(both))
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    with torch.no_grad():
        logits = frameworks.torch_network(model)(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    denoised = torch.sigmoid(logits).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(denoised, model(images), atol=1e-4)


def test_layers_that_are_not_translated_to_pytorch_are_refused(frameworks):
    pytest.importorskip("torch", reason="needs the extra `peers`")
    noisy = keras.Input((28, 28, 1))
    for layer, word in (
        (keras.layers.Dropout(0.1), "Dropout"),
        (keras.layers.Conv2D(1, 3, padding="same", dilation_rate=2, activation="sigmoid"), "other values"),
    ):
        with pytest.raises(UsageError, match=f"^--model: .*{word}"):
            frameworks.torch_network(keras.Model(noisy, layer(noisy)))


def test_the_jax_program_refuses_other_networks(frameworks):
    with pytest.raises(UsageError, match="conv, not blog"):
        frameworks.jax_jit(RunConfig(model="blog"), start=None)


def test_operations_of_strided_and_transposed_convolutions_are_counted(scripts):
    from benchmark import operations_per_image

    noisy = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(3, 4, strides=2, padding="same")(noisy)
    model = keras.Model(noisy, keras.layers.Conv2DTranspose(1, 6, strides=2, padding="same")(x))
    first, last = 2 * 4 * 4 * (4 * 4 * 3), 2 * 4 * 4 * (6 * 6 * 3)
    assert operations_per_image(model) == 2 * first + 3 * last


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--rounds", 0), "--rounds"),
        (("--only", "fitt"), "did you mean 'fit'"),
        (("--model", "unett"), "did you mean 'unet'"),
        (("--require", 2, "--only", "fit"), "dae"),
    ],
)
def test_benchmark_refuses_mistakes_before_it_times_anything(arguments, word, tmp_path):
    done = run_in_process("benchmarks/benchmark.py", *arguments, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert word in done.stderr


def test_time_to_quality_reports_when_each_run_reaches_the_target(tmp_path):
    arguments = ("--train-examples", 1280, "--epochs", 6, "--presets", "default", "fast", "--output", "out")
    done = run_subprocess("benchmarks/time_to_quality.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "time_to_quality.json").read_text())
    assert {name: len(epochs) for name, epochs in saved["results"].items()} == {"fit": 6, "default": 6, "fast": 2}
    assert saved["target"] == saved["results"]["default"][-1]["validation_bce"]
    lines = (tmp_path / "out" / "default" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation_bce"] == saved["target"]
    assert (tmp_path / "out" / "time_to_quality.png").exists()


def test_time_to_quality_with_a_target_trains_only_the_given_presets(tmp_path):
    arguments = ("--train-examples", 1280, "--presets", "fast", "--target", 1, "--output", "out")
    done = run_subprocess("benchmarks/time_to_quality.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "time_to_quality.json").read_text())
    assert (list(saved["results"]), saved["target"]) == (["fast"], 1)
    assert "| fast | 1 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--presets", "fasst", "--target", 1), "did you mean 'fast'"),
        (("--presets", "tutorial", "--target", 1), "validation"),
        (("--presets", "fast"), "needs default"),
        (("--presets", "fast", "--target", 0), "--target"),
    ],
)
def test_time_to_quality_refuses_mistakes_before_it_trains_anything(arguments, word, scripts, tmp_path):
    done = run_in_process("benchmarks/time_to_quality.py", *arguments, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert word in done.stderr
    assert not (tmp_path / "out").exists()


def test_startup_times_each_command():
    done = run_subprocess("benchmarks/startup.py", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("| run.py")]) == 3


def test_denoise_throughput_compares_both_ways():
    done = run_subprocess("benchmarks/denoise_throughput.py", "--models", "conv", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split("|")[5]) for line in done.stdout.splitlines() if line.startswith("| conv")]
    assert len(ratios) == 2
    assert all(0.3 < ratio < 3 for ratio in ratios)


@pytest.mark.slow
def test_scaling_measures_messages_and_models_more_workers():
    done = run_subprocess("benchmarks/scaling.py", "--steps", 2, "--rounds", 1, "--max-workers", 2)
    assert done.returncode == 0, done.stderr
    assert "two workers with a shard each" in done.stdout
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in table] == ["1", "2", "4", "8", "16", "32", "64"]
    rates = [float(row[2].replace(",", "")) for row in table]
    assert rates == sorted(rates)
    assert rates[0] > 0


@pytest.mark.slow
def test_kill_and_resume_ends_in_identical_runs():
    done = run_subprocess("benchmarks/kill_and_resume.py", "--kills", 2)
    assert done.returncode == 0, done.stderr
    assert "2 kills" in done.stdout


def test_keras_fit_writes_a_model(tmp_path):
    arguments = ("--epochs", 1, "--train-examples", 500, "--output", tmp_path / "fit.keras")
    done = run_in_process("benchmarks/keras_fit.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "fit.keras").count_params() == 4_385


def test_screenshots_without_runs_are_refused(tmp_path):
    done = run_in_process("benchmarks/screenshots.py", "--logdir", tmp_path)
    assert done.returncode == 2
    assert "--logdir" in done.stderr


# The only test that needs a browser, which pip cannot install and neither the README nor CI asks for.
@pytest.mark.skipif(
    not (importlib.util.find_spec("selenium") and shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs the extra `browser`, Chromium and its driver",
)
def test_screenshots_of_every_tab_are_saved(tiny_run, tmp_path):
    done = run_subprocess("benchmarks/screenshots.py", "--logdir", tiny_run, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("scalars", "images", "hparams", "projector"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
