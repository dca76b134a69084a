"""README.md and docs/: generated tables, links, and the examples of losses, a network and noise of a user."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_in_process

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_generated_tables_equal_the_code(page):
    text = page.read_text()
    assert runpy.run_path(str(ROOT / "docs" / "generate.py"))["updated"](text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
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
    assert (done.returncode, done.stderr) == (0, "")
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
