"""The notebook runs, the README and the pages name only what exists, and the wheel holds the right files."""

import re
import subprocess
import sys
import zipfile

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.search(r"loss of the last 50 steps: ([\d.]+)", text).group(1)) < 0.5  # untrained: 1
    assert "DDIMScheduler, 20 network calls" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_the_notebook_shows_results_and_nothing_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == i + 1 for i, cell in enumerate(code))
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert "site-packages" not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_pages_name_exist(page):
    """Check links to files (mkdocs checks the site's, but not the README's) and options of the commands."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|\b(?:src|href)=\"?)(?!https?:|#)([^)#\"\s>]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:ddpm_mlp_pipeline|export|train_scripts|tests|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ddpm_mlp_pipeline").rglob("*.py"))
    sources += (ROOT / "tests" / "kill_training.py").read_text() + (ROOT / "tests" / "fuzz_files.py").read_text()
    theirs = {
        "quiet",
        "cpu",
        "multi_gpu",
        "num_processes",
        "machine_rank",
        "config_file",
        "directory",
        "help",
        "config",
    }
    for option in re.findall(r"`[^`]*?--(?:no-)?([a-z_]+)", text):
        assert option in theirs or re.search(rf"\b{option}\b", sources), option


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_little_else(tmp_path):
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    subprocess.run([str(word) for word in build], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "ddpm_mlp_pipeline"], cwd=ROOT, capture_output=True, text=True)
    assert names == set(tracked.stdout.split())
    assert wheel.stat().st_size < 16 * 2**20
