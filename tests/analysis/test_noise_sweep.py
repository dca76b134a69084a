import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import run_in_process
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dae import config as config_module
from dae.analysis import noise_sweep
from dae.analysis.noise_sweep import Denoiser, Result
from dae.config import RunConfig
from dae.data import datasets
from dae.errors import UsageError
from dae.evaluation import metrics
from dae.reporting import plots
from dae.training import trainer
from dae.workdir import model_files

LEVELS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, mnist) -> Path:
    """A finished run on 300 digits, tested on 100."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    data = folder.with_suffix(".npz")
    np.savez(data, x_train=mnist.train.pixels[:300], x_test=mnist.test.pixels[:100])
    trainer.train(RunConfig(data=str(data), batch_size=64, epochs=1), folder)
    return folder


@pytest.fixture(scope="module")
def denoiser(run) -> Denoiser:
    config = config_module.read(run / "config.json")
    return Denoiser("small", model_files.load_model(run), config, datasets.load(config).test)


@pytest.fixture(scope="module")
def results(denoiser) -> list[Result]:
    return list(noise_sweep.sweep([denoiser], ("gaussian", "masking"), LEVELS))


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that the test writes."""
    written: list[Figure] = []
    save = plots.save

    def save_and_keep(path: Path, figure: Figure) -> None:
        save(path, figure)
        written.append(figure)

    monkeypatch.setattr(plots, "save", save_and_keep)
    return written


def test_each_denoiser_is_evaluated_on_each_noise_at_each_level(results):
    assert [(r.denoiser, r.noise, r.level) for r in results] == [
        (name, noise, level) for name in ("none", "small") for noise in ("gaussian", "masking") for level in LEVELS
    ]


def test_metrics_of_noisy_images_follow_from_the_noise(results, mnist):
    by_cell = {(r.denoiser, r.noise, r.level): r.metrics for r in results}
    for noise in ("gaussian", "masking"):
        assert by_cell["none", noise, 0.0]["mse"] == 0
        psnr = [by_cell["none", noise, level]["psnr"] for level in LEVELS]
        assert psnr == sorted(psnr, reverse=True)
    clean = mnist.test.pixels[:100] / 255
    # At level 1 all pixels are masked.
    assert by_cell["none", "masking", 1.0]["mse"] == pytest.approx((clean**2).mean(), rel=1e-5)


def test_a_model_is_compiled_once_for_all_levels(denoiser, monkeypatch):
    traced, psnr = [], metrics.METRICS["psnr"]

    def counted(clean, denoised):
        traced.append(1)
        return psnr(clean, denoised)

    monkeypatch.setitem(metrics.METRICS, "psnr", counted)
    list(noise_sweep.sweep([denoiser], ("gaussian", "poisson"), (0.1, 0.2, 0.3)))
    assert len(traced) == 2 * denoiser.config.shards  # the model's and the baseline's


def test_an_invalid_level_is_refused_before_anything_is_computed(denoiser):
    with pytest.raises(UsageError, match=r"--noise-level: .*masking.* 2.0"):
        next(noise_sweep.sweep([denoiser], ("gaussian", "masking"), (0.5, 2.0)))


def test_evaluate_compares_runs_in_tables_a_plot_and_a_csv_file(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    arguments = ("--noise-levels", 0.1, 0.5, "--noises", "gaussian", "salt_pepper")
    done = run_in_process("evaluate.py", run, "other", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| PSNR, dB | level | none | small | other |" in done.stdout
    report = json.loads((run / "report.json").read_text())
    assert f"| {report['test_psnr']:.2f} | {report['test_psnr']:.2f} |\n" in done.stdout
    with open(tmp_path / "sweep.csv") as file:
        rows = {(row["denoiser"], row["noise"], row["level"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * 2 * 2
    assert float(rows["small", "gaussian", "0.5"]["psnr"]) == pytest.approx(report["test_psnr"], rel=1e-6)
    assert rows["small", "gaussian", "0.5"]["psnr"] == rows["other", "gaussian", "0.5"]["psnr"]
    assert tf.io.decode_png((tmp_path / "sweep.png").read_bytes()).shape[0] > 400


def test_runs_with_other_test_images_are_not_compared(run, tiny_run, tmp_path):
    done = run_in_process("evaluate.py", run, tiny_run, "--noise-levels", 0.1, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tiny_run}: has other test images than {run}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_evaluate_without_a_model_asks_for_one(tmp_path):
    done = run_in_process("evaluate.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "models" in done.stderr


def test_noises_of_the_same_name_get_different_labels(denoiser, tmp_path):
    for file, factor in (("a.py", "0.9"), ("b.py", "0.1")):
        (tmp_path / file).write_text(f"def darker(clean, level, seed):\n    return {factor} * clean\n")
    results = noise_sweep.sweep([denoiser], (f"{tmp_path}/a.py:darker", f"{tmp_path}/b.py:darker"), (0.5,))
    mse = {result.noise: result.metrics["mse"] for result in results if result.denoiser == "none"}
    assert mse["darker-2"] == pytest.approx(81 * mse["darker"], rel=1e-4)


def test_tables_have_a_row_for_each_noise_and_level(results):
    rows = [line.strip("| ").split(" | ") for line in noise_sweep.tables(results).splitlines() if line]
    assert [row[:2] for row in rows[2:8]] == [
        [noise, level] for noise in ("gaussian", "masking") for level in ("0", "0.5", "1")
    ]
    start = rows.index([noise_sweep.TITLES["psnr"], "level", "none", "small"])
    shown = {(noise, float(level)): values for noise, level, *values in rows[start + 2 : start + 8]}
    for result in results:
        assert shown[result.noise, result.level][result.denoiser == "small"] == f"{result.metrics['psnr']:.2f}"


def test_the_plot_has_a_curve_for_each_denoiser_and_a_row_for_each_noise(results, denoiser, figures, tmp_path):
    noise_sweep.draw(tmp_path / "sweep.png", results, [denoiser])
    (figure,) = figures
    panels = {(axes.get_xlabel(), number % len(noise_sweep.TITLES)): axes for number, axes in enumerate(figure.axes)}
    column = list(noise_sweep.TITLES).index("psnr")
    for noise in ("gaussian", "masking"):
        curves = {line.get_label(): line for line in panels[f"{noise} level", column].lines}
        for name in ("none", "small"):
            own = [r for r in results if (r.denoiser, r.noise) == (name, noise)]
            np.testing.assert_array_equal(curves[name].get_xdata(), LEVELS)
            np.testing.assert_array_equal(curves[name].get_ydata(), [r.metrics["psnr"] for r in own])
    assert figure.axes[column].get_title() == noise_sweep.TITLES["psnr"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_one_level_is_a_matrix_of_noises_and_denoisers(results, denoiser, figures, tmp_path):
    one_level = [result for result in results if result.level == 0.5]
    noise_sweep.draw(tmp_path / "sweep.png", one_level, [denoiser])
    (figure,) = figures
    assert len(figure.axes) == len(noise_sweep.TITLES)
    for axes, (metric, title) in zip(figure.axes, noise_sweep.TITLES.items(), strict=True):
        assert axes.get_title() == f"{title} (level 0.5)"
        columns, rows = ([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis))
        assert (columns, rows) == (["none", "small"], ["gaussian", "masking"])
        shown = {text.get_position(): text.get_text() for text in axes.texts}
        assert shown == {
            (columns.index(r.denoiser), rows.index(r.noise)): f"{r.metrics[metric]:.3g}" for r in one_level
        }


def test_the_plot_shades_a_trained_range_and_marks_a_trained_level(denoiser, figures, tmp_path):
    blind = replace(denoiser, name="blind", config=replace(denoiser.config, noise_level=(0.1, 0.8)))
    other = replace(denoiser, name="other", config=replace(denoiser.config, noise="masking", noise_level=(0.2, 0.3)))
    values = dict.fromkeys(noise_sweep.TITLES, 1.0)
    shown = [Result(name, "gaussian", level, values) for name in ("small", "blind", "other") for level in LEVELS]
    noise_sweep.draw(tmp_path / "sweep.png", shown, [denoiser, blind, other])
    (figure,) = figures
    for axes in figure.axes:
        colours = {line.get_label(): line.get_color() for line in axes.lines}
        (shade,) = axes.patches
        assert isinstance(shade, Rectangle)
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((0.1, 0.8))
        assert shade.get_facecolor()[:3] == pytest.approx(to_rgb(colours["blind"]))
        (mark,) = [line for line in axes.lines if line.get_linestyle() == ":"]
        np.testing.assert_array_equal(mark.get_xdata(), [0.5, 0.5])
        assert mark.get_color() == colours["small"]


def test_show_noise_plots_all_noises(tmp_path):
    done = run_in_process("show_noise.py", "--noise-levels", 0, 0.5, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert tf.io.decode_png((tmp_path / "noise.png").read_bytes()).shape[0] > 600
