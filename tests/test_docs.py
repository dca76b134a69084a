"""README.md and docs/: generated tables, links, and the examples of losses, a network and noise of a user."""

import re
import runpy
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
def test_docs_examples_of_loss_network_and_noise_train(tmp_path):
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", pages, re.DOTALL)
    assert [name for name, _ in blocks] == ["my_losses.py", "my_networks.py", "my_noise.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    loss, model, noise = "bce + 10*my_losses.py:fourth_power", "my_networks.py:plain", "my_noise.py:stripes"
    small = ("--train-examples", 500, "--batch-size", 8, "--bce-steps", 20, "--epochs", 1, "--quiet")
    done = run_in_process(
        "run.py", "--loss", loss, "--model", model, "--noise", noise, *small, "--run-dir", "run", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_docs_example_of_a_loss_with_inputs_trains(tmp_path):
    page = (ROOT / "docs" / "losses_with_inputs.md").read_text()
    ((name, code),) = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(code)
    small = ("--train-examples", 500, "--bce-steps", 1, "--epochs", 1, "--quiet", "--run-dir", "run")
    done = run_in_process("run.py", "--loss", f"bce + {name}:consistency", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_example_loss_trains(tmp_path):
    loss = f"bce + 0.5*{ROOT}/experiments/examples/bright_loss.py:bright_mse"
    small = ("--train-examples", 500, "--batch-size", 8, "--bce-steps", 20, "--epochs", 1, "--quiet")
    done = run_in_process("run.py", "--loss", loss, *small, "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
