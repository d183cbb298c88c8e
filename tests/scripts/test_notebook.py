"""The notebook runs from top to bottom, in a folder of its own, with one epoch a run."""

import json

import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_notebook_contains_no_output():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("QUICKSTART_EPOCHS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "work").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = next(cell for cell in notebook.cells if "REPOSITORY" in cell.source)
    setup.source = setup.source.replace("(Path.cwd(), Path.cwd().parent)", f"(Path({str(ROOT)!r}),)")

    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "work")}}
    ).execute()

    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert printed.count("on the validation split, epoch 1") == 3 and "scene_0" in printed
    assert {"quickstart", "quickstart-own", "quickstart-alpha-1.0"} <= {
        path.name for path in (tmp_path / "work" / "runs").iterdir()
    }
