"""The first notebook runs from top to bottom, and its gradient steps reduce the losses.

`tests/test_site.py` compares all notebooks with their pages; the build of the site runs the cells of these pages.
"""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOK = COLAB / "start_here.ipynb"

CHECK = """
import json
spread = float(np.ptp(np.log(predicted["rate"])))
finite = all(bool(jnp.isfinite(loss).all()) for loss in losses.values())
values, steps = tuned.evaluations.tolist(), len(result.history["value"])
summary = {"values": values, "steps": steps, "spread": spread, "finite": finite}
print(json.dumps(summary))
"""


def test_notebooks_are_stored_without_outputs():
    files = sorted(COLAB.glob("*.ipynb"))
    assert len(files) == 6 and NOTEBOOK in files
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(code) > 3 and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.filterwarnings("default")  # the notebook server's libraries are not ours
@pytest.mark.once
def test_runs_with_small_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("METAOPT_SMALL", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # half the seconds of compiling
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    summary = json.loads(notebook.cells[-1].outputs[0].text)
    assert summary["values"][-1] < 0.9 * summary["values"][0]  # λ was tuned
    assert (
        summary["steps"] == 5 and summary["spread"] > 0 and summary["finite"]
    )  # g's predictions differ between tables
