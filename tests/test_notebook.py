"""The example notebook runs from top to bottom on a run that the test learns."""

import os
import re
from pathlib import Path

import pytest

from dymoe.cli import main
from tests.learning.tiny import write_recipe

TASKS = ["ScienceQA", "ImageNet", "VQAv2"]
NOTEBOOK = Path(__file__).parents[1] / "examples" / "analysis.ipynb"


def test_the_notebook_runs(tiny_folder, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package)
    training = {"steps_per_task": 2, "limit": 8, "dynamics_every": 1}
    assert main(["run", str(write_recipe(tmp_path / "run.yaml", tiny_folder, tasks=TASKS, training=training))]) == 0
    monkeypatch.setenv("DYMOE_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DYMOE_SAMPLES", "2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "src")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    shown = "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert all(f"after {task}" in shown for task in TASKS)
    assert re.search(r"\d+ of \d+ experts have a mean weight below", "".join(o.get("text", "") for o in outputs))


def test_it_is_kept_small_with_the_outputs_of_a_real_run():
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOK.stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    told = [output for cell in cells for output in cell.outputs]
    assert not [output for output in told if output.output_type == "error" or output.get("name") == "stderr"]
    assert "/tmp/" not in NOTEBOOK.read_text(encoding="utf-8")
