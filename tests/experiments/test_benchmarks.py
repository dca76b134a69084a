"""Scripts in experiments/benchmarks/, on few images; noise_levels.py, noisy_only.py and zero_shot.py have no test."""

import functools
import importlib.util
import json
import shutil

import keras
import numpy as np
import pytest
from growth import exponent
from helpers import EXPERIMENTS, run_in_process
from measure import Program, in_turn
from PIL import Image
from programs import operations_per_image

from dae.config import RunConfig
from dae.errors import RunError
from dae.models import networks
from dae.training.trainer import train


def test_functions_are_called_in_turn_after_a_warm_up_that_does_not_count():
    calls = []

    def call(name):
        calls.append(name)
        return len(calls)

    functions = {name: functools.partial(call, name) for name in "ab"}
    assert in_turn(functions, rounds=2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3


def test_a_program_that_fails_is_reported_in_one_line_with_the_end_of_its_log():
    with Program("nothing", RunConfig()) as program, pytest.raises(RunError, match=r"^nothing: .*KeyError: 'nothing'$"):
        program.epoch()


@pytest.mark.slow
def test_benchmark_compares_each_program_with_the_first_and_fails_if_dae_is_slower_than_required(tmp_path):
    checkout = str(EXPERIMENTS.parent)
    programs = ["fit", "dae", "limit", "train step", "denoise"]
    programs += ["PyTorch"] if importlib.util.find_spec("torch") else []
    arguments = ("--rounds", 1, "--train-examples", 640, "--output", "out", "--require", 1000, "--only", *programs)
    done = run_in_process("benchmarks/benchmark.py", *arguments, "--checkouts", checkout, cwd=tmp_path, status=1)
    assert f"--require: expected 1000.0 times the speed of dae of {checkout}" in done.stderr
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    speeds = saved["images_per_second"]
    assert list(speeds) == [f"dae of {checkout}", *programs]
    for name in programs:
        (epoch,) = saved["epochs"][name]
        images = 144 * 215 if name == "denoise" else 640
        assert name == "limit" or speeds[name] == [images / epoch["seconds"]]
        assert epoch["megabytes"] > 0
    ratio, of_the_limit = (speeds["dae"][0] / speeds[name][0] for name in (f"dae of {checkout}", "limit"))
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| dae |"))
    assert f" {ratio:.2f} | " in row
    assert row.endswith(f" {of_the_limit:.0%} |")


@pytest.mark.parametrize("name", ["conv", "patches", "unet"])
def test_the_pytorch_network_computes_the_same_as_the_keras_network(name):
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    import torch_networks

    model, copy = networks.build(RunConfig(model=name, width=2), (28, 28, 1)), torch_networks.NETWORKS[name](2)
    random = np.random.default_rng(1)
    for weight in model.weights:  # so that biases matter
        weight.assign(weight + random.uniform(0, 0.1, weight.shape))
    with torch.no_grad():
        for parameter, weight in zip(copy.parameters(), model.get_weights(), strict=True):
            values = weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight  # for both kinds of convolution
            assert parameter.shape == values.shape
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        images = random.random((3, 28, 28, 1), np.float32)
        denoised = torch.sigmoid(copy(torch.from_numpy(images.transpose(0, 3, 1, 2)))).numpy()
    np.testing.assert_allclose(denoised.transpose(0, 2, 3, 1), model(images, training=False), atol=1e-4)


def test_operations_of_strided_and_transposed_convolutions_are_counted():
    noisy = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(3, 4, strides=2, padding="same")(noisy)
    model = keras.Model(noisy, keras.layers.Conv2DTranspose(1, 6, strides=2, padding="same")(x))
    first, last = 2 * 4 * 4 * (4 * 4 * 3), 2 * 4 * 4 * (6 * 6 * 3)
    assert operations_per_image(model) == 2 * first + 3 * last


@pytest.mark.slow
def test_a_record_has_the_psnr_of_the_model_that_is_kept_for_each_of_several_seeds(tmp_path):
    settings = ("--seeds", 2, "--train-examples", 1280, "--epochs", 2, "--programs", "dae", "fit")
    done = run_in_process("benchmarks/record.py", *settings, "--target", 9, "--output", "out", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "record.json").read_text())["results"]
    for seed, run in enumerate(results["dae"]):
        report = train(RunConfig(train_examples=1280, epochs=2, seed=seed), tmp_path / f"seed-{seed}", quiet=True)
        assert (run["psnr"], run["weights_sha256"]) == (report["test_psnr"], report["weights_sha256"])
    dae, fit = (line.split(" | ") for line in done.stdout.splitlines()[-2:])
    assert dae[1:3] == ["dae", "default --train-examples 1280 --epochs 2"]
    assert [len(runs) for runs in results.values()] == [2, 2]
    assert fit[-1] == "1, not reached |"  # a black image has 9.4 dB


@pytest.mark.slow
def test_models_are_measured_beside_published_figures(tmp_path):
    (tmp_path / "Set12").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8).repeat(6, 0).repeat(6, 1)
        Image.fromarray(pixels).save(tmp_path / "Set12" / f"{number}.png")
    arguments = (tmp_path, "--sets", "Set12", "--self-ensemble", "--rounded")
    done = run_in_process("benchmarks/standard_photographs.py", *arguments)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    titles = [row[0] for row in table]
    assert titles[0] == "Set12"
    assert titles[2] == "no denoising"
    noisy, ours, averaged, rounded = ([float(cell.split(" / ")[0]) for cell in row[1:5]] for row in table[2:6])
    assert noisy[0] == np.inf
    assert noisy[2] == pytest.approx(20.5, abs=0.5)
    assert ours[2] > noisy[2] + 4
    assert ours[0] > 40
    assert rounded[0] > 40
    assert averaged[2] == pytest.approx(ours[2], abs=1)
    assert "DnCNN, one level, 556 k weights (1)" in titles


@pytest.mark.slow
def test_the_operations_of_a_step_are_listed_with_their_fractions_of_the_time():
    done = run_in_process("benchmarks/operations.py", "--steps", 5, "--train-examples", 640, "--batch-size", 32)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line][2:]
    fractions = [float(row[2].rstrip("%")) for row in rows]
    assert fractions == sorted(fractions, reverse=True)
    assert 80 < sum(fractions) <= 100
    assert any("Conv2DBackpropFilter" in row[0] for row in rows)


@pytest.mark.slow
def test_startup_times_each_command():
    done = run_in_process("benchmarks/startup.py", "--rounds", 1)
    assert len([line for line in done.stdout.splitlines() if line.startswith("| run.py")]) == 3


@pytest.mark.parametrize("cost", [lambda size: 600 + 3 * size, lambda size: 0.1 + 1e-4 * (size - 10) ** 2])
def test_the_exponent_of_growth_is_that_above_the_fixed_cost(cost):
    sizes = [10, 100, 1000, 10_000]
    assert exponent(sizes, [cost(size) for size in sizes]) == pytest.approx(1 if cost(10) > 600 else 2)


def test_the_exponent_of_a_constant_cost_is_about_zero():
    assert abs(exponent([300, 600, 900], [0.05, 0.052, 0.051])) < 0.02
    assert exponent([1, 3], [2, 6]) == pytest.approx(1)


@pytest.mark.slow
def test_growth_measures_each_axis_and_prints_the_model_of_several_workers(tmp_path):
    arguments = ("--axes", "batch_size", "workers", "--points", 2, "--output", "out")
    done = run_in_process("benchmarks/growth.py", *arguments, cwd=tmp_path)
    costs = json.loads((tmp_path / "out" / "growth.json").read_text())["costs"]
    assert {axis: [size for size, *_ in points] for axis, points in costs.items()} == {
        "batch_size": [16, 64],
        "workers": [1, 2],
    }
    assert all(seconds > 0 and megabytes > 0 for points in costs.values() for _, seconds, megabytes, _ in points)
    for words in ("messages: 4 kB in ", "| 64 |  | ", "| batch_size | 16 to 64 | ", "| workers | 1 to 2 | "):
        assert words in done.stdout
    assert (tmp_path / "out" / "growth.png").stat().st_size > 1000


@pytest.mark.slow
def test_runs_that_were_killed_and_resumed_end_identical():
    done = run_in_process("benchmarks/kill_and_resume.py", "--kills", 1, "--workers", 2, "--seed", 5)
    assert "1 kills" in done.stdout


# The only test that needs a browser, which pip cannot install and neither the README nor CI asks for.
@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("selenium") and shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs the extra `browser`, Chromium and its driver",
)
def test_screenshots_of_every_tab_are_saved(tiny_run, tmp_path):
    run_in_process("benchmarks/screenshots.py", "--logdir", tiny_run, "--output", tmp_path)
    for name in ("scalars", "images", "train_step", "network", "hparams"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
