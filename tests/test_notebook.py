"""The first notebook runs from top to bottom, and its gradient steps reduce the losses.

`tests/test_site.py` compares all notebooks with their pages; the build of the site runs the cells of these pages.
"""

import importlib.util
import json
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

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


class Shell:
    """Stands for IPython: keeps what the cell passes to pip."""

    def __init__(self, names):
        self.names, self.lines = names, []

    def run_line_magic(self, name, line):
        self.lines.append(f"{name} {line.format(**self.names)}")


def install_cell(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4).cells[1].source


def run_install_cell(folder, repository, monkeypatch):
    """Runs the first code cell in a folder, as if metaopt were not installed; returns the lines for pip."""
    lines = TransformerManager().transform_cell(install_cell("start_here")).split("\n")
    lines = [f"REPOSITORY = {repository!r}" if line.startswith("REPOSITORY = ") else line for line in lines]
    names = {}
    shell = Shell(names)
    names["get_ipython"] = lambda: shell
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        exec("\n".join(lines).partition("import jax\n")[0], names)
    return shell.lines


def test_the_first_cell_installs_from_an_address_or_a_folder(tmp_path, monkeypatch):
    extras = "[examples,optuna,records]"
    address = "https://github.com/someone/metaopt.git"
    lines = run_install_cell(tmp_path, address, monkeypatch)
    assert lines == [f'pip install -q "metaopt-jax{extras} @ git+{address}"']

    clone = tmp_path / "metaopt"
    for file in (clone / "pyproject.toml", clone / "metaopt" / "base.py", clone / "colab" / "start_here.ipynb"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    expected = [f'pip install -q "{clone.resolve()}{extras}"']
    assert run_install_cell(tmp_path, "metaopt", monkeypatch) == expected
    assert run_install_cell(clone / "colab", "https://github.com/OWNER/metaopt.git", monkeypatch) == expected


@pytest.mark.parametrize("repository", ["https://github.com/OWNER/metaopt.git", "/no/such/folder"])
def test_the_first_cell_says_what_to_set(repository, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Set it in this cell: replace OWNER, or upload a clone"):
        run_install_cell(tmp_path, repository, monkeypatch)


def test_the_first_cell_does_not_start_jax_before_a_notebook_sets_its_devices():
    for file in COLAB.glob("*.ipynb"):
        text = file.read_text()
        assert ("jax_num_cpu_devices" in text) == ("jax.devices()" not in install_cell(file.stem))


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
