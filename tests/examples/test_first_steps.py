"""The notebook runs from top to bottom."""

import re

import pytest

from training_runs import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip)")
nbformat = pytest.importorskip("nbformat")


def test_the_notebook_runs_and_does_what_it_says(undisturbed, monkeypatch):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (pip)")
    monkeypatch.setenv("FIRST_STEPS_MODEL", str(undisturbed[0]))
    monkeypatch.setenv("FIRST_STEPS_TRAIN_STEPS", "20")
    path = ROOT / "examples" / "first_steps.ipynb"
    notebook = nbformat.read(path, as_version=4)
    # It is stored with its pictures, and none of an error.
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in stored) == 4
    assert "Traceback" not in path.read_text()
    assert path.stat().st_size < 200_000
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT / "examples"}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    text = "".join(output.get("text", "") for output in outputs)
    assert "same output: True" in text
    fresh = float(re.search(r"its attention taken off ([\d.]+)", text).group(1))
    trained = float(re.search(r"held-out loss ([\d.]+)", text).group(1))
    assert trained < fresh
