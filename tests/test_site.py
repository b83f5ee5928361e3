"""The site: docstrings become reStructuredText, and the whole site builds without a warning and without the network."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def module(name):
    """Imports a module of `docs`, which is not a package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


docstrings = module("docstrings")


def converted(text, room="hypergrad"):
    return "\n".join(docstrings.converted(text.split("\n"), room)).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The norm |x|, *args and x_ of `a_b*`.", r"The norm \|x\|, \*args and x\_ of ``a_b*``."),
        ("Within ±`clip` (`x`).", r"Within ±\ ``clip`` (``x``)."),
        ("The solvers `cg`s.", r"The solvers :py:obj:`cg <metaopt.hypergrad.cg>`\ s."),
        ("See `nas.darts` and `nas.nothing`.", "See :py:obj:`nas.darts <metaopt.nas.darts>` and ``nas.nothing``."),
        (
            "An `Estimator` of a `base.Task`, and `Sequence`.",
            "An :py:obj:`Estimator <metaopt.base.Estimator>` of a :py:obj:`base.Task <metaopt.base.Task>`, "
            "and ``Sequence``.",
        ),
        ("One `a\nb` code.", "One ``a b`` code."),
        ("An equation\n\n    F(λ) = |θ|²\n\nends.", "An equation\n\n::\n\n    F(λ) = |θ|²\n\nends."),
        ("A list:\n- one\n  more\n- two", "A list:\n\n- one\n  more\n\n- two"),
        (
            "A table:\n\n| a | b |\n|---|---|\n| `x` | |\n\n    |x|",
            "A table:\n\n\n.. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - ``x``\n     -\n\n\n"
            "::\n\n    |x|",
        ),
        ("**Cost.** Up to 2**24, with **kw.", r"**Cost.** Up to 2\*\*24, with \*\*kw."),
        ("|w| is a norm.", r"\|w\| is a norm."),
        ("Source: Somebody,\n  https://arxiv.org/abs/1 (2020)", "Source: Somebody,\nhttps://arxiv.org/abs/1 (2020)"),
        (
            "Adds.\n\nArgs:\n  x: one.\n    Two.\n  *rest: more.",
            "Adds.\n\n:param x:\n  one.\n  Two.\n:param \\*rest:\n  more.",
        ),
        ("Args:\n  x: one, not\n    two: three.", ":param x:\n  one, not\n  two: three."),
        (
            "Returns:\n  A sum.\n\nRaises:\n  ValueError: if `x < 0`.",
            ":returns:\n  A sum.\n\n:raises ValueError:\n  if ``x < 0``.",
        ),
        ("Text.\n>>> f(x_)\n|1|", "Text.\n\n>>> f(x_)\n|1|"),
    ],
)
def test_docstrings_become_restructured_text(text, expected):
    assert converted(text) == expected


def test_the_gallery_has_a_card_for_each_row_of_the_experiments():
    pytest.importorskip("sphinx")
    text = (ROOT / "experiments" / "README.md").read_text()
    cards = module("extension").cards(text)
    assert cards.count("grid-item-card") == len(re.findall(r"^\| .*results/.*\.md\)", text, re.M)) > 30
    pictures = re.findall(r":img-top: \.\./(\S+)", cards)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("num_pages", [0, 3, 40])
def test_each_process_begins_with_as_many_pages_with_cells(num_pages, tmp_path):
    parallel = pytest.importorskip("sphinx.util.parallel")
    names = [f"page{i:02}" for i in range(num_pages)]
    with_cells = names[-13:]  # next to one another, as those of a folder are
    for name in names:
        (tmp_path / name).write_text("```{code-cell} python3" if name in with_cells else "text")
    ordered = names.copy()
    environment = SimpleNamespace(doc2path=lambda name: tmp_path / name)
    module("extension").spread_cells(SimpleNamespace(parallel=2), environment, ordered)
    assert sorted(ordered) == names
    counts = [len(set(chunk) & set(with_cells)) for chunk in parallel.make_chunks(ordered, 2)]
    assert counts[:2] == {0: [], 3: [1, 1], 40: [7, 6]}[num_pages]
    module("extension").spread_cells(SimpleNamespace(parallel=0), environment, ordered)  # Sphinx without `-j`
    assert sorted(ordered) == names


def test_pages_of_the_site_are_in_a_table_of_contents():
    text = (ROOT / "docs" / "index.md").read_text() + (ROOT / "docs" / "reference" / "index.md").read_text()
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts and page.stem != "index"]
    entries = text.split("\n")
    missing = [p.name for p in pages if not {p.stem, f"{p.parent.name}/{p.stem}"} & set(entries)]
    assert len(pages) > 30 and missing == []


class Sources(HTMLParser):
    """Collects the addresses that a browser loads to display a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        loads = tag in ("script", "img", "iframe", "source", "video") or attributes.get("rel") in ("stylesheet", "icon")
        self.addresses += [attributes[name] for name in ("src", "href") if loads and attributes.get(name)]


def outside_sources(html):
    sources = Sources()
    sources.feed(html)
    imports = re.findall(r"(?:@import|import\(?|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", html)
    return [address for address in sources.addresses if re.match(r"(https?:)?//", address)] + imports


def test_outside_sources_are_seen():
    html = '<a href="https://a"><script src="https://b"></script><link rel="stylesheet" href="//c"><img src="d.png">'
    assert outside_sources(html + "<style>@import url('https://e/f.css')</style>")[:2] == ["https://b", "//c"]
    assert "https://e/f.css" in outside_sources("<style>@import url('https://e/f.css')</style>")


@pytest.mark.slow  # needs the extra `docs`, with which `.ci/run` runs this file
def test_notebooks_are_written_from_the_pages():
    """Run `python docs/notebooks.py` after a change of a page. The build of the site runs the cells of most pages."""
    pytest.importorskip("jupytext")
    notebooks, nbformat = module("notebooks"), pytest.importorskip("nbformat")
    assert {f"{name}.ipynb" for name in notebooks.PAGES} == {file.name for file in (ROOT / "colab").glob("*.ipynb")}
    for name, page in notebooks.PAGES.items():
        notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
        assert notebook == nbformat.from_dict(notebooks.notebook(page)), f"`python docs/notebooks.py` for {name}"
        nbformat.validate(notebook)
        assert notebooks.REPOSITORY in notebook.cells[1].source
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", "\n".join(texts)) if "://" not in link]
        assert [link for link in links if not (ROOT / "colab" / link).exists()] == []
        code = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
        assert not any("docs/records" in line or "pathlib.Path(metaopt" in line for line in code)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(tmp_path):
    """Cells run, unless `docs/_build` has their outputs from an earlier build."""
    pytest.importorskip("sphinx_book_theme")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html"]
    process = subprocess.run(
        [*command, "-c", "docs", ".", str(tmp_path)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    pages = list(tmp_path.rglob("*.html"))
    sources = [page for page in (ROOT / "docs").rglob("*.md") if not page.parts[len(ROOT.parts) + 1].startswith("_")]
    assert [s for s in sources if not (tmp_path / s.relative_to(ROOT)).with_suffix(".html").is_file()] == []
    outside = {page.name: outside_sources(page.read_text()) for page in pages}
    assert len(pages) > 60 and {name: addresses for name, addresses in outside.items() if addresses} == {}
    assert (tmp_path / "searchindex.js").stat().st_size > 100_000
