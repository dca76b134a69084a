"""Each script in experiments/benchmarks/, on few images."""

import importlib.util
import json
import shutil

import pytest
from helpers import EXPERIMENTS, run_in_process, run_subprocess

from dae.config import RunConfig
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
def test_benchmark_times_the_train_step_and_the_pipeline(program, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))
    from benchmark import time_in_turn

    timed = time_in_turn([program], RunConfig(train_examples=640, epochs=3), rounds=1)
    assert timed[program]["seconds"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--rounds", 0), "--rounds"),
        (("--only", "fitt"), "did you mean 'fit'"),
        (("--require", 2, "--only", "fit"), "dae"),
    ],
)
def test_benchmark_refuses_mistakes_before_it_times_anything(arguments, word, tmp_path):
    done = run_in_process("benchmarks/benchmark.py", *arguments, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert word in done.stderr


def test_time_to_quality_reports_when_each_run_reaches_the_target(tmp_path):
    arguments = ("--train-examples", 1280, "--epochs", 6, "--output", "out")
    done = run_subprocess("benchmarks/time_to_quality.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "time_to_quality.json").read_text())
    assert {name: len(epochs) for name, epochs in saved["results"].items()} == {"fit": 6, "default": 6, "fast": 2}
    assert saved["target"] == saved["results"]["default"][-1]["validation_bce"]
    lines = (tmp_path / "out" / "default" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation_bce"] == saved["target"]
    assert (tmp_path / "out" / "time_to_quality.png").exists()


def test_startup_times_each_command():
    done = run_subprocess("benchmarks/startup.py", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("| run.py")]) == 3


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
