"""The notebook runs from top to bottom, on a smaller budget, twice in one kernel."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "experiments" / "colab" / "quickstart.ipynb"


def test_where_ponder_is_missing_one_line_says_what_to_set(monkeypatch) -> None:
    install = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    exec(install.source, {})  # nothing to do
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^set REPOSITORY above to the address [^\n]*$"):
        exec(install.source, {})


def test_the_quickstart_runs_twice_in_one_kernel(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    changed = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and "STEPS = 800" in cell.source:
            cell.source = cell.source.replace("STEPS = 800", "STEPS = 8").replace("50_000", "512").replace("64,", "16,")
            changed += 1
    assert changed == 1
    first = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells += [nbformat.v4.new_code_cell(cell.source) for cell in first]
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text" in output
    )
    assert printed.count("accuracy") >= 2
    assert os.path.exists(tmp_path / "cache")
