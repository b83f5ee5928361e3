"""Parts of the site that Sphinx does not have: cells within tabs, the order of pages, and the gallery of results."""

import itertools
import re
from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx.util.parallel import make_chunks

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "README.md"
_ROW = re.compile(r"^\| (.+) \| (.+) \| `(.+)` \| (.+) \| (.+) \| (.*\.md\).*) \|$")


class CellsInTabs(SphinxTransform):
    """Moves a cell with the tag "in-tab" into the last tab of the set above it: cells do not run within directives."""

    default_priority = 800

    def apply(self, **kwargs):
        for cell in list(self.document.findall(nodes.container)):
            if "tag_in-tab" in cell["classes"]:
                siblings = cell.parent.children
                tabs = siblings[siblings.index(cell) - 1]
                if tabs.get("design_component") != "tab-set":
                    raise ValueError(
                        f"The cell at line {cell.line} of {cell.source} does not follow a set of tabs."
                    )
                cell.parent.remove(cell)
                tabs.children[-1].children[-1].append(cell)


def spread_cells(app, env, docnames):
    """Handles `env-before-read-docs`: pages with cells come first, an equal number of them for each process.

    Sphinx gives each process a chunk of pages. In the order of names, one process would run most of the cells.
    """
    num = max(app.parallel, 1)  # 0 without `-j`
    with_cells = [
        name for name in docnames if "{code-cell}" in env.doc2path(name).read_text()
    ]
    size = len(make_chunks(docnames, num)[0]) if docnames else 0
    others = iter([name for name in docnames if name not in with_cells])
    chunks = [with_cells[i::num] for i in range(num)]
    docnames[:] = [
        name
        for chunk in chunks
        for name in [*chunk, *itertools.islice(others, max(size - len(chunk), 0))]
    ]
    docnames += others


def fill_gallery(app, docname, source):
    """Handles `source-read`: replaces the mark by the cards of all experiments."""
    if "<!-- gallery -->" in source[0]:
        app.env.note_dependency(str(EXPERIMENTS))
        source[0] = source[0].replace(
            "<!-- gallery -->", cards(EXPERIMENTS.read_text())
        )


def cards(text):
    """Returns a card for each row of the tables of `experiments/README.md`, below the headings of the tables."""
    parts = []
    for theme in text.split("\n## ")[1:]:
        rows = [row.groups() for row in map(_ROW.match, theme.split("\n")) if row]
        grid = "\n".join(_card(*row) for row in rows)
        parts.append(
            f"## {theme.split(chr(10))[0]}\n\n::::{{grid}} 1 1 2 2\n:gutter: 3\n\n{grid}\n::::\n"
        )
    return "\n".join(parts)


def _card(question, answer, command, data, minutes, links):
    pages = re.findall(r"results/(\w+)\.md", links)
    minutes = (
        f"{minutes} min"
        if minutes[0].isdigit()
        else "a few minutes"
        if minutes == "minutes"
        else minutes
    )
    more = " ".join(
        f"[{page}](../experiments/results/{page}.md)" for page in pages[1:]
    )
    return f""":::{{grid-item-card}} {question}
:link: /experiments/results/{pages[0]}
:link-type: doc
:img-top: ../experiments/results/{pages[0]}.png

{answer} {more}

`{command}` · {minutes} · data: {data}
:::"""
