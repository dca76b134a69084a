"""experiments/score_table.py, on few images."""

import csv
import os
import shutil
import sys
from dataclasses import replace

import pytest
from helpers import run_in_process, run_subprocess

from dae import analysis
from dae import config as config_module


def require_extra() -> None:
    for package in ("scipy", "skimage", "bm3d"):
        pytest.importorskip(package, reason="needs the extra `baselines`")


@pytest.mark.slow
def test_score_table_trains_measures_and_resumes(tiny_run, tmp_path):
    require_extra()
    shutil.copytree(tiny_run, tmp_path / "blind")
    config = config_module.read(tiny_run / "config.json")
    (tmp_path / "blind" / "config.json").write_text(config_module.to_json(replace(config, noise_level=(0.1, 0.8))))
    quick = ["--presets", "quick", "--seeds", 1, "--classical-examples", 10, "--output", "out"]
    others = ["--runs", tiny_run, "blind", "--models", tiny_run / "model.h5"]
    filters = ["--filters", "median", "BM3D", "--tune-examples", 4]
    levels = ["--noise-levels", 0.2, 0.5, "--level-examples", 10]
    done = run_subprocess("score_table.py", *quick, *others, *filters, *levels, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with open(tmp_path / "out" / "score_table.csv") as file:
        rows = {row["denoiser"]: row for row in csv.DictReader(file)}
    expected = {"no denoising", "median", "BM3D", "posterior mean", "quick", "tiny", "blind", "model"}
    assert set(rows) == expected
    psnr = [float(row["psnr"]) for row in rows.values()]
    assert psnr == sorted(psnr)
    with open(tmp_path / "out" / "noise_levels.csv") as file:
        assert {row["denoiser"] for row in csv.DictReader(file)} == {"no denoising", "BM3D", "posterior mean", "blind"}

    report = tmp_path / "out" / "quick" / "seed-0" / "report.json"
    finished = report.stat().st_mtime_ns
    done = run_subprocess("score_table.py", *quick, "--filters", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training" not in done.stdout.splitlines()[0]
    assert report.stat().st_mtime_ns == finished


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--presets", "fsat"], ["--presets: ", "did you mean 'fast'"]),
        (["--seeds", 0], ["--seeds: ", "got 0"]),
        (["--noise-levels", 0.5, 0], ["--noise-levels: ", "got 0"]),
        (["--filters", "bm3d"], ["--filters: ", "BM3D"]),
        (["--tune-examples", 5001], ["--tune-examples: ", "from 1 to 5000"]),
        (["--classical-examples", 9], ["--classical-examples: ", "from 10 to 10000"]),
        (["--level-examples", 0], ["--level-examples: ", "got 0"]),
    ],
)
def test_score_table_refuses_mistakes_before_it_writes_anything(arguments, words, tmp_path):
    require_extra()
    done = run_in_process("score_table.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for word in words:
        assert word in done.stderr
    assert os.listdir(tmp_path) == []


def test_score_table_without_its_extra_names_what_to_install(monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.startswith(("bm3d", "dae.analysis.")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("classical", "score_table"):
        monkeypatch.delattr(analysis, name, raising=False)  # so that the script imports it anew
    monkeypatch.setitem(sys.modules, "bm3d", None)
    done = run_in_process("score_table.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install '.[baselines]'" in done.stderr
