"""The site: docstrings become reStructuredText, and the whole site builds without a warning and without the network."""

import contextlib
import importlib.util
import os
import re
import sqlite3
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


@pytest.mark.slow  # needs the extra `docs`
def test_the_gallery_has_a_card_for_each_row_of_the_experiments():
    pytest.importorskip("myst_nb")
    text = (ROOT / "experiments" / "README.md").read_text()
    cards = module("extension").cards(text)
    assert cards.count("grid-item-card") == len(re.findall(r"^\| .*results/.*\.md\)", text, re.M)) > 30
    pictures = re.findall(r":img-top: \.\./(\S+)", cards)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def pages_with_cells(tmp_path, pages, timeout=60):
    """The arguments of `run_cells` for pages, each with the cells of a list."""
    config = pytest.importorskip("myst_nb.core.config").NbParserConfig(
        execution_mode="cache",
        execution_cache_path=str(tmp_path / "cache"),
        execution_excludepatterns=["left_out.md"],
        execution_timeout=timeout,
    )
    for name, cells in pages.items():
        blocks = [f"```{{code-cell}} python3\n{cell}\n```\n" for cell in cells]
        head = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n" if cells else ""
        (tmp_path / f"{name}.md").write_text("\n".join([head, *blocks]))
    myst_config = importlib.import_module("myst_parser.config.main").MdParserConfig()
    environment = SimpleNamespace(
        mystnb_config=config, myst_config=myst_config, doc2path=lambda name: tmp_path / f"{name}.md"
    )
    return SimpleNamespace(parallel=2), environment, list(pages)


def cached(environment):
    cache = importlib.import_module("jupyter_cache").get_cache(environment.mystnb_config.execution_cache_path)
    records = {Path(record.uri).stem: record.pk for record in cache.list_cache_records()}
    return {name: cache.get_cache_bundle(pk).nb.cells for name, pk in sorted(records.items())}


@pytest.mark.slow  # needs the extra `docs`
def test_cells_of_changed_pages_run_once_in_order_and_apart_from_other_pages(tmp_path):
    """Outputs of processes that a cell starts are outputs of the cell."""
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('run '); x = 'one'"
    process = (
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import sys; print(5, file=sys.stderr)'])\n1"
    )
    two = ["print('x' in globals())", process]
    pages = {"one": [counted, "print(x)\n2 + 1"], "two": two, "left_out": ["1 / 0"], "none": []}
    app, environment, names = pages_with_cells(tmp_path, pages)
    for _ in range(2):
        module("extension").run_cells(app, environment, names)
    outputs = {name: [cell.outputs for cell in cells] for name, cells in cached(environment).items()}
    assert (tmp_path / "runs").read_text() == "run " and list(outputs) == ["one", "two"]
    assert [output.get("text") or output.data["text/plain"] for output in outputs["one"][1]] == ["one\n", "3"]
    assert outputs["two"][0][0].text == "False\n"
    assert [(output.output_type, output.get("text")) for output in outputs["two"][1][1:]] == [("stream", "5\n")]
    page = tmp_path / "one.md"
    page.write_text(page.read_text() + "\n```{code-cell} python3\nprint(x * 2)\n```\n")
    module("extension").run_cells(app, environment, names)
    assert (tmp_path / "runs").read_text() == "run run "
    assert cached(environment)["one"][-1].outputs[0].text == "oneone\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "reason", "on_stderr"),
    [
        ("1 / 0", "a cell failed", "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"a cell failed \(exit code -9\)", ""),
        ("import time; time.sleep(100)", "a cell ran longer", ""),
    ],
)
def test_a_cell_with_an_error_ends_the_build(tmp_path, cell, reason, on_stderr, capfd):
    app, environment, names = pages_with_cells(tmp_path, {"bad": [cell], "good": ["1"]}, timeout=2)
    with pytest.raises(Exception, match=rf"bad\.md: {reason}"):
        module("extension").run_cells(app, environment, names)
    assert "bad" not in cached(environment) and on_stderr in capfd.readouterr().err


def test_the_records_of_pages_know_the_source_of_their_objective():
    """Else the site would show old outcomes after a change of the objective, without an error."""
    for file in (ROOT / "docs" / "records").glob("*.db"):
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as records:
            names = {row[1] for row in records.execute("SELECT * FROM origins")}
        tasks = {name.removeprefix("task ") for name in names if name.startswith("task ")}
        assert {f"objective of {task}" for task in tasks} <= names and len(tasks) > 50


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
    imports = re.findall(r"(?:@import|import\(?|url\(|fetch\(|src ?=)\s*['\"`]?((?:https?:)?//[^'\"`)\s]+)", html)
    return [address for address in sources.addresses if re.match(r"(https?:)?//", address)] + imports


def test_outside_sources_are_seen():
    html = '<a href="https://a"><script src="https://b"></script><link rel="stylesheet" href="//c"><img src="d.png">'
    assert outside_sources(html + "<style>@import url('https://e/f.css')</style>")[:2] == ["https://b", "//c"]
    assert "https://e/f.css" in outside_sources("<style>@import url('https://e/f.css')</style>")
    assert outside_sources("s.src = 'https://g/h.js'; fetch(`//i`)") == ["https://g/h.js", "//i"]


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
    skeletons = ROOT / "docs" / "how_to" / "new_parts.py"
    assert skeletons.read_text() == notebooks.skeletons(), "`python docs/notebooks.py` for the skeletons"


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(tmp_path):
    """Cells run, unless `docs/_build` has their outputs from an earlier build."""
    pytest.importorskip("sphinx_book_theme")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-j", "2", "-b", "html"]
    process = subprocess.run(
        [*command, "-c", "docs", ".", str(tmp_path)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "Executing notebook" not in process.stdout + process.stderr  # MyST-NB finds all outputs in the cache
    pages = list(tmp_path.rglob("*.html"))
    sources = [page for page in (ROOT / "docs").rglob("*.md") if not page.parts[len(ROOT.parts) + 1].startswith("_")]
    assert [s for s in sources if not (tmp_path / s.relative_to(ROOT)).with_suffix(".html").is_file()] == []
    files = [*pages, *tmp_path.rglob("*.css"), *tmp_path.rglob("*.js")]
    outside = {file.name: outside_sources(file.read_text()) for file in files}
    assert (
        len(pages) > 60
        and len(files) > len(pages) + 10
        and {name: addresses for name, addresses in outside.items() if addresses} == {}
    )
    assert (tmp_path / "searchindex.js").stat().st_size > 100_000
