"""experiments/score_table.py, on few images."""

import csv

import pytest
from helpers import run_subprocess


@pytest.mark.slow
def test_score_table_trains_measures_and_resumes(tiny_run, tmp_path):
    for package in ("scipy", "skimage", "bm3d"):
        pytest.importorskip(package, reason="needs the extra `baselines`")
    arguments = ["--presets", "good", "--seeds", 1, "--classical-examples", 10, "--output", "out"]
    others = ["--runs", tiny_run, "--models", tiny_run / "model.h5", "--filters", "median", "--tune-examples", 4]
    done = run_subprocess("score_table.py", *arguments, *others, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with open(tmp_path / "out" / "score_table.csv") as file:
        rows = {row["denoiser"]: row for row in csv.DictReader(file)}
    (run,) = set(rows) - {"no denoising", "median", "posterior mean", "good", "model"}
    assert "--batch-size 64" in run
    psnr = [float(row["psnr"]) for row in rows.values()]
    assert psnr == sorted(psnr)

    report = tmp_path / "out" / "good" / "seed-0" / "report.json"
    finished = report.stat().st_mtime_ns
    done = run_subprocess("score_table.py", *arguments, "--filters", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training" not in done.stdout.splitlines()[0]
    assert report.stat().st_mtime_ns == finished
