"""README.md and docs/: generated tables, links, the notebook, and examples of losses, a network, noise and loggers."""

import copy
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_in_process

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
LINK = r"\]\((?!https?://)([^)#]+)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_generated_tables_equal_the_code(page):
    text = page.read_text()
    assert runpy.run_path(str(ROOT / "docs" / "generate.py"))["updated"](text) == text


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_docs_links_lead_to_files(page):
    links = re.findall(LINK, page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_docs_examples_of_losses_a_network_and_noise_train_together(tmp_path):
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/data.md", "docs/losses_with_inputs.md"))
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", pages, re.DOTALL)
    assert [name for name, _ in blocks] == ["my_losses.py", "my_networks.py", "my_noise.py", "consistency.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    example = f"{ROOT}/experiments/examples/bright_loss.py:bright_mse"
    loss = f"bce + 10*my_losses.py:fourth_power + consistency.py:consistency + 0.5*{example}"
    plugins = ("--loss", loss, "--model", "my_networks.py:plain", "--noise", "my_noise.py:stripes")
    small = ("--train-examples", 500, "--batch-size", 8, "--bce-steps", 20, "--epochs", 1, "--quiet")
    done = run_in_process("run.py", *plugins, *small, "--run-dir", "run", cwd=tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("logger", "written"), [("wandb", "wandb/offline-run-*/*.wandb"), ("mlflow", "mlflow.db")])
def test_docs_examples_of_other_loggers_train_and_log(logger, written, tmp_path):
    pytest.importorskip(logger, reason="needs the extra `loggers`")
    page = (ROOT / "docs" / "logging.md").read_text()
    name, code = next(
        found for found in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL) if logger in found[0]
    )
    (tmp_path / name).write_text(code)
    environment = {**os.environ, "WANDB_MODE": "offline"}  # without an account
    done = subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/report.json"))
    assert list(tmp_path.glob(written))


@pytest.mark.slow
def test_docs_notebook_runs_and_stores_the_outputs_of_its_code(tmp_path, monkeypatch):
    packages = ("nbclient", "nbformat", "ipykernel")
    nbclient, nbformat, _ = (pytest.importorskip(name, reason="needs the extra `test`") for name in packages)
    stored = nbformat.read(NOTEBOOK, as_version=4)
    executed = copy.deepcopy(stored)
    for cell in executed.cells:
        cell |= {"outputs": [], "execution_count": None} if cell.cell_type == "code" else {}
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "images")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)  # for `!dae`
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(executed, kernel_name="python3", resources=resources).execute()  # raises if a cell fails
    nbformat.write(executed, tmp_path / NOTEBOOK.name)
    assert len(stored.cells) <= 15
    assert NOTEBOOK.stat().st_size < 700_000
    outputs = []
    for cells in (stored.cells, executed.cells):
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
        assert not any("retracing" in text for text in texts)
        psnr = [float(value) for text in texts for value in re.findall(r"PSNR ([\d.]+) dB", text)]
        kinds = [[sorted(output.data) for output in cell.outputs if "data" in output] for cell in code]
        outputs.append((kinds, psnr))
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] == pytest.approx(outputs[1][1], abs=0.3)
    assert (tmp_path / "runs" / "comparison" / "comparison.md").exists()
