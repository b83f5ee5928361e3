"""Writes the notebooks of `colab/` and the file of skeletons from pages of the site, and the records of two pages.

python docs/notebooks.py            # colab/*.ipynb and docs/how_to/new_parts.py, in seconds
python docs/notebooks.py --records  # docs/records/*.db, in minutes; needed if a cell that they depend on changes
"""

import argparse
import contextlib
import linecache
import os
import re
import shutil
import tempfile
from pathlib import Path

import jupytext
import nbformat

import metaopt

ROOT = Path(__file__).parents[1]
REPOSITORY = (
    "https://github.com/OWNER/metaopt.git"  # no copy has a public address yet
)
PAGES = {
    "start_here": "docs/start_here.md",
    "few_shot": "docs/how_to/few_shot_images.md",
    "architecture_search": "docs/how_to/cell_search.md",
    "optax_in_one_line": "metaopt/transforms/README.md",
    "black_boxes": "docs/how_to/forest_for_new_table.md",
    "many_devices": "docs/how_to/many_devices.md",
}
SKELETONS = "docs/how_to/new_parts"
WITH_RECORDS = ("forest_for_new_table", "conv_nets")

INSTALL = """\
import importlib.util
from pathlib import Path

# Replace OWNER: REPOSITORY is the Git address of a copy of metaopt. Or upload a clone to this
# machine, and set REPOSITORY to its folder, such as "/content/metaopt".
REPOSITORY = "{repository}"

spec = importlib.util.find_spec("metaopt")
if spec is None or spec.origin is None:  # a folder that is only called metaopt has no origin
    extras = "examples,optuna,records"
    if Path("../metaopt/base.py").is_file():  # this notebook lies in a clone
        REPOSITORY = ".."
    if Path(REPOSITORY, "pyproject.toml").is_file():
        requirement = f"{Path(REPOSITORY).resolve()}[{extras}]"
    elif "://" in REPOSITORY and "OWNER" not in REPOSITORY:
        requirement = f"metaopt-jax[{extras}] @ git+{REPOSITORY}"
    else:
        raise ValueError(
            f"metaopt is not installed, and REPOSITORY, {REPOSITORY!r}, is not the address of a copy. "
            "Set it in this cell: replace OWNER, or upload a clone and give its folder."
        )
    %pip install -q "{requirement}"

import jax

import metaopt

print("metaopt", metaopt.__version__, "with jax", jax.__version__)""".replace(
    "{repository}", REPOSITORY
)
DEVICES = """
print("devices:", jax.devices())"""


def cells_of(page: str) -> list[nbformat.NotebookNode]:
    """The cells of a page, without those that only the build of the site needs."""
    text = re.sub(
        r"\A---\n.*?\n---\n", "", (ROOT / page).read_text(), flags=re.DOTALL
    )
    cells = jupytext.reads(
        text, fmt="md:myst" if "{code-cell}" in text else "md"
    ).cells
    return [
        cell for cell in cells if "remove-cell" not in cell.metadata.get("tags", [])
    ]


def notebook(page: str) -> nbformat.NotebookNode:
    """The notebook of a page: without outputs, with the cell that installs metaopt, and with links from `colab/`."""
    cells, new = cells_of(page), nbformat.v4
    sets_devices = any(
        "jax_num_cpu_devices" in cell.source for cell in cells
    )  # only before `jax.devices()`
    written = [new.new_code_cell(INSTALL if sets_devices else INSTALL + DEVICES)]
    for cell in cells:
        make = (
            new.new_code_cell if cell.cell_type == "code" else new.new_markdown_cell
        )
        written.append(
            make(
                cell.source
                if cell.cell_type == "code"
                else relinked(cell.source, page)
            )
        )
    if cells[0].cell_type == "markdown":
        written[:2] = written[1::-1]  # the title comes first
    for i, cell in enumerate(written):
        cell.id = f"cell-{i:02}"
    metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    return new.new_notebook(cells=written, metadata=metadata)


def relinked(text: str, page: str) -> str:
    """Markdown with the links of a page, as they are from `colab/`."""

    def link(match):
        target = match[1]
        if "://" in target or target.startswith("#"):
            return match[0]
        return f"]({os.path.relpath(ROOT / page / '..' / target, ROOT / 'colab')})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def skeletons() -> str:
    """The code of the page of skeletons as one Python file, with the titles of its sections."""
    parts = ['"""Skeletons of new parts; the page new_parts.md explains them."""']
    for cell in cells_of(f"{SKELETONS}.md"):
        titles = re.findall(r"^## (.*)$", cell.source, flags=re.MULTILINE)
        is_code = cell.cell_type == "code"
        parts += (
            [cell.source] if is_code else [f"# --- {title} ---" for title in titles]
        )
    return "\n\n\n".join(parts) + "\n"


def collect_records(name: str) -> None:
    """Runs the cells of a page in an empty store."""
    names: dict = {}
    for i, cell in enumerate(cells_of(f"docs/how_to/{name}.md")):
        if cell.cell_type == "code":
            file, lines = f"{name}, cell {i}", cell.source.splitlines(keepends=True)
            # `collect` stores a digest of the objective's source, so that it notices a change.
            linecache.cache[file] = len(cell.source), None, lines, file
            exec(compile(cell.source, file, "exec"), names)
    failed = metaopt.blackbox.read_records(f"{name}.db", status="FAIL")
    if failed:
        raise RuntimeError(f"{len(failed)} trials of {name} failed")
    (ROOT / "docs" / "records").mkdir(exist_ok=True)
    shutil.copy(f"{name}.db", ROOT / "docs" / "records")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records",
        action="store_true",
        help="collect the records of pages again, in minutes",
    )
    if parser.parse_args().records:
        for name in WITH_RECORDS:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                collect_records(name)
    else:
        for name, page in PAGES.items():
            nbformat.write(notebook(page), ROOT / "colab" / f"{name}.ipynb")
        (ROOT / f"{SKELETONS}.py").write_text(skeletons())
