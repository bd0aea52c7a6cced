"""The notebooks in docs/notebooks run from beginning to end, on small settings, in a kernel of their own."""

import re
from pathlib import Path

import nbformat
import pytest
from conftest import HANG
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"ITERATIONS": 2, "TASKS": 4}
QUICK = """
import fewshot.api
from functools import partial
knobs = {"model__width": 8, "meta_batch_size": 2, "val_tasks": 2, "test_tasks": 4, "threads": 1, "trainer": "cpu"}
fewshot.api.train = partial(fewshot.api.train, **knobs, dataset__cache=CACHE)
"""  # what makes each training of a notebook small
ROUGH = """
from fewshot.evidence import report
from fewshot.evidence.claims import frozen_encoder, label_orders
report.png, label_orders.TASKS, frozen_encoder.STEPS = partial(report.png, dpi=20), 1, (1, 2)
"""  # and what makes a page, here the one of the suite that a process of its own writes, quick


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # those of somebody's machine
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in SMALL.items():
        settings.source = re.sub(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
    for cell in notebook.cells:
        if cell.cell_type == "code" and ".evidence(" in cell.source:
            cell.source = ROUGH + cell.source
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICK.replace("CACHE", repr(str(cache)))))
    NotebookClient(notebook, timeout=HANG, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    if path.stem == "your_own_images":
        assert "image/png" in shown and len(re.findall(r"accuracy.*: \d+%", said)) == 2
    else:
        assert re.search(r"relative difference: \d\.\de-0[6789]", said) and "22 of 22 identities hold" in said
