import csv
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import EXPERIMENTS, run_here
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dae import config as configs
from dae.analysis import loss_comparison
from dae.analysis.loss_comparison import Comparison, conclusion
from dae.analysis.statistics import differences, estimate, holm
from dae.evaluation.metrics import METRICS

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_holm_of_a_worked_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert np.isnan(holm([math.nan])).all()


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_nor_changes_the_order(p_values):
    corrected = holm(p_values)
    pairs = list(zip(p_values, corrected, strict=True))
    for (other_p, other), (p, one) in itertools.pairwise([(0.0, 0.0), *pairs]):
        assert p <= one <= min(1, p * len(p_values) if p == min(p_values) else 1)
        assert p > other_p or one <= other


# In steps of a float32: the squares of differences such as 1e-218 vanish, of which SciPy warns.
@given(st.lists(st.floats(-1000, 1000, width=32, allow_subnormal=False), min_size=2, max_size=9, unique=True))
def test_the_interval_is_students(values):
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    one = estimate(values)
    np.testing.assert_allclose([one.low, one.high], [low, high], rtol=1e-6, atol=1e-9)


def test_the_interval_holds_the_true_mean_nineteen_times_in_twenty():
    draws = np.random.default_rng(0).normal(3, 2, (4000, 4))
    inside = np.mean([one.low < 3 < one.high for one in map(estimate, draws.tolist())])
    assert inside == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_differences_are_paired_by_seed():
    first, better = [10.0, 20.0, 30.0], [10.5, 20.6, 30.55]  # far apart between seeds, close together within them
    one, same = differences(first, [better, first])
    assert one.low > 0.4
    assert one.p < 0.01
    assert one.p_corrected == pytest.approx(2 * one.p)
    assert (same.same, same.mean, same.p, same.p_corrected) == (True, 0, 1, 1)
    (single,) = differences([1.0], [[2.0]])
    assert single.mean == 1
    assert np.isnan([single.low, single.high, single.p, single.p_corrected]).all()


def compared(**psnr: list[float]) -> Comparison:
    """Losses with these PSNRs, and their negatives as MSEs."""
    mse = {loss: [-value for value in values] for loss, values in psnr.items()}
    figures: dict[str, dict[str, list[float]]] = {"psnr": psnr, "mse": mse}
    seeds = list(range(len(next(iter(psnr.values())))))
    return Comparison(list(psnr), seeds, {loss: [1 for _ in seeds] for loss in psnr}, {"validation": figures})


def test_the_conclusion_says_no_more_than_the_figures_do():
    comparison = compared(a=[10.0, 12.0, 11.0], b=[11.0, 13.1, 12.05], c=[10.1, 11.8, 11.2], d=[10.0, 12.0, 11.0])
    for metric in ("psnr", "mse"):  # more dB is better, more error worse
        words = conclusion(comparison, metric)
        assert f"By mean {metric} on validation images over 3 seeds, from best to worst: b (" in words
        assert "b is better than a: " in words
        assert "c against a: no difference can be concluded: " in words
        assert "d against a: no difference, the very same figures in every seed." in words
    assert "a is worse than b: " in conclusion(compared(b=[11.0, 13.1, 12.05], a=[10.0, 12.0, 11.0]), "psnr")
    one = conclusion(compared(a=[10.0], b=[11.0]), "psnr")
    assert "One seed says nothing" in one
    assert "better" not in one


LINE = ["--losses", "bce", "bce", "2*bce", "--seeds", "2", "--data", "few.npz", "--validation-examples", "128"]
LINE += ["--batch-size", "64", "--epochs", "1", "--output", "out"]
NAMES = ["bce", "bce-2", "2xbce"]


def test_a_killed_comparison_goes_on_and_a_loss_equals_itself(tmp_path, mnist):
    np.savez(tmp_path / "few.npz", x_train=mnist.train[:384], x_test=mnist.test[:64])
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(EXPERIMENTS / "compare_losses.py"), *LINE], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    while not (out / "bce-2" / "seed-0" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = out / "bce" / "seed-0" / "report.json"
    before = finished.stat().st_mtime_ns

    done = run_here("compare_losses.py", *LINE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert finished.stat().st_mtime_ns == before
    assert "bce-2 against bce: no difference, the very same figures in every seed." in done.stdout
    assert "epoch 1/1" not in done.stdout  # a line per run, not per epoch

    everything = json.loads((out / "comparison.json").read_text())
    assert everything["losses"] == NAMES
    for split in ("validation", "test"):
        for metric in METRICS:
            figures = everything["figures"][split][metric]
            assert figures["bce"] == figures["bce-2"]
    report = json.loads(finished.read_text())
    psnr = everything["figures"]["test"]["psnr"]
    assert psnr["bce"][0] == report["test_psnr"]
    assert psnr["bce"][0] != psnr["bce"][1]
    # Adam divides the scale out again, all but its epsilon.
    assert psnr["2xbce"] == pytest.approx(psnr["bce"], abs=0.02)
    assert psnr["2xbce"] != psnr["bce"]

    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(METRICS) * len(NAMES)
    (row,) = [row for row in rows if (row["split"], row["metric"], row["loss"]) == ("test", "psnr", "bce")]
    assert float(row["mean"]) == pytest.approx(np.mean(psnr["bce"]))
    assert "| `2xbce` | " in (out / "comparison.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # One seed alone, of the same runs.
    runs = {name: [out / name / "seed-1"] for name in NAMES}
    settings = configs.read(out / "bce" / "seed-1" / "config.json")
    loss_comparison.save(loss_comparison.gather(runs, [1]), "psnr", out, settings)
    assert "One seed says nothing" in (out / "comparison.md").read_text()
    assert "NaN" not in (out / "comparison.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "bce", "mes"], "--loss: unknown name 'mes'; did you mean 'mse'?"),
        (["--losses", "bce", "mse +* bce"], "--loss: cannot read 'mse +* bce' at '* bce'"),
        (["--losses", "bce", "--metric", "psnrr"], "--metric: unknown name 'psnrr'; did you mean 'psnr'?"),
        (["--losses", "bce", "--seeds", "0"], "--seeds: 0 is not"),
        (["--losses", "bce", "--validation-examples", "0"], "--validation-examples: is 0, but losses are ranked on"),
        (["--losses", "--loss", "mse"], "--losses: name one or more"),
    ],
)
def test_a_mistake_is_found_before_the_first_run(arguments, message, tmp_path):
    done = run_here("compare_losses.py", *arguments, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_without_scipy_one_line_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("scipy", "dae.analysis.statistics", "dae.analysis.loss_comparison"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("dae.analysis.loss_comparison")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", "--losses", "bce"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(EXPERIMENTS / "compare_losses.py"), run_name="__main__")
    assert leaving.value.code == 2
    assert "scipy is not installed, and needed here: pip install '.[compare]'" in capsys.readouterr().err
    assert loss_comparison
