"""Mistakes of users of the scripts: one line, status 2, before anything is measured, trained or written."""

import os
import subprocess
import sys

import pytest
from helpers import EXPERIMENTS, run_in_process

BENCHMARKS = [
    ("benchmark", ("--only", "fitt"), "did you mean 'fit'"),
    ("benchmark", ("--require", 2, "--only", "fit"), "--require: needs dae"),
    ("startup", ("--rounds", 0), "--rounds: "),
    ("time_to_quality", ("--presets", "fasst"), "did you mean 'fast'"),
    ("time_to_quality", ("--presets", "tutorial"), "--presets: tutorial has no validation images"),
    ("keras_fit", ("--output", "model.png"), "--output: "),
    ("screenshots", ("--logdir", "."), "--logdir: . holds no TensorBoard files"),
]
EXPORT = [
    (("text.h5", "--format", "savedmodel", "--output", "out"), "text.h5: not a readable model"),
    (("none", "--format", "savedmodel", "--output", "out"), "none: no such run's folder or model file"),
    (("text.h5", "--output", "out"), "--format"),
    (("run", "--format", "tflite", "--output", "a.tflite"), "--format: unknown name 'tflite'; did you mean 'litert'?"),
]
LOSSES = ("--losses", "bce")
COMPARISON = [
    ((*LOSSES, "mes"), "did you mean 'mse'"),
    ((*LOSSES, "--metric", "psnrr"), "--metric: unknown name 'psnrr'; did you mean 'psnr'?"),
    ((*LOSSES, "--seeds", 0), "--seeds: expected an integer >= 1, got 0"),
    ((*LOSSES, "--preset", "tutorial"), "--validation-examples: 0"),
    ((*LOSSES, "--loss", "mse"), "--losses: --loss is a flag of run.py"),
    (("--values", 1, 2), "--losses: "),
    (("--field", "width", "--values", 1, *LOSSES), "--values: "),
    (("--field", "widht", "--values", 1), "did you mean 'width'"),
    (("--field", "seed", "--values", 1, 2), "--field: seed is what repeats a run; see --seeds"),
    (("--field", "width", "--values", 1, "x"), "--width: expected int, got 'x'"),
    ((*LOSSES, "--tune", "--rates", 4), "--rates: expected an odd number >= 3, got 4"),
    (("--field", "learning-rate", "--values", 0.1, "--tune"), "--tune: "),
]
SCORE_TABLE = [
    (("--presets", "fsat"), "did you mean 'fast'"),
    (("--filters", "bm3d"), "--filters: unknown name 'bm3d'"),
    (("--tune-examples", 5001), "--tune-examples: expected an integer from 1 to 5000"),
    (("--classical-examples", 9), "--classical-examples: expected an integer from 10 to 10000"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(f"benchmarks/{script}", *case) for script, *case in BENCHMARKS]
    + [("export", *case) for case in EXPORT]
    + [("compare_losses", *case) for case in COMPARISON]
    + [("score_table", *case) for case in SCORE_TABLE],
)
def test_mistake_is_reported_in_one_line_before_anything_is_done(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))  # from which benchmarks import each other
    for package in ("scipy", "skimage", "bm3d") if script == "score_table" else ():
        pytest.importorskip(package, reason="needs the extra `baselines`")
    (tmp_path / "text.h5").write_text("no model")
    done = run_in_process(f"{script}.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert os.listdir(tmp_path) == ["text.h5"]


def test_mistake_in_the_flags_of_export_is_reported_before_tensorflow_is_imported(tmp_path):
    arguments = [str(EXPERIMENTS / "export.py"), "run", "--format", "tflite", "--output", "a.tflite"]
    program = f"""if True:
        import runpy, sys
        sys.argv = {arguments}
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            assert "tensorflow" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
