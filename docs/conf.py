"""The site: pages of `docs/`, the results of the experiments, and the docstrings. CONTRIBUTING.md has the command.

Sources are found from the root of the repository, so that a link works here as it does between the files themselves.
"""

import gc
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils import math
from docutils.utils.math import latex2mathml
from sphinx.util import logging

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

# For the programs of the cells. They have few optimizations, and pages have many small programs in common.
CELLS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "docs" / "_build" / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OMP_NUM_THREADS": "1",  # each page has one core
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no warning of IPython's debugger
}
# Without XLA's fusion emitters, JAX 0.10 compiles in half the time. JAX 0.12 has no such flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    CELLS["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
for variable, value in CELLS.items():
    os.environ.setdefault(variable, value)
paths = (str(ROOT), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
gc.set_threshold(200_000, 20, 100)  # tracing and pages make many objects

import docstrings  # noqa: E402
import extension  # noqa: E402
import metaopt  # noqa: E402

# Most pages import these. Forks of this process, which run the cells, have them already.
for module in (
    "flax.nnx",
    "matplotlib.figure",
    "optax",
    "pandas",
    "sklearn.ensemble",
):
    importlib.import_module(module)

ignored = (f"ignore:{message}" for message in extension.IGNORED_WARNINGS)
os.environ.setdefault("PYTHONWARNINGS", ",".join(ignored))
logger = logging.getLogger(__name__)

project, author, version = "metaopt", "The metaopt authors", metaopt.__version__
extensions = ["sphinx.ext.autodoc", "myst_nb", "sphinx_design"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "experiments/README.md",
    "experiments/results/*.md",
    "metaopt/transforms/README.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = ["docs/_build", ".*", "build", "dist", "tests"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!metaopt).*|.*\._.*")
]  # other packages, and private types
suppress_warnings = [
    "myst.header"
]  # the pages of results, which scripts write, skip a level

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Cells run once for each change of a page; an error, or a line on stderr, is a failure.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "cells")
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["docs/start_here.md"]  # run by the tests
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_output_stderr = "warn"
nb_merge_streams = True
nb_ipywidgets_js = {}
autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # `optax.sgd`, not the text of a function object
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = "metaopt"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # the page at the top, which leads to docs/index.html
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "default",
}


def visit_math(writer, node):
    """Writes MathML, which browsers display without a script.

    A process that writes a part of the pages may end with an error without a word. A warning ends the build with `-W`.
    """
    try:
        formula = latex2mathml.tex2mathml(
            node.astext(), as_block=isinstance(node, nodes.math_block)
        )
        writer.body.append(
            _numbered(node, formula) if node.get("number") else formula
        )
    except math.MathError as error:
        logger.warning(
            "%s in the formula %r. Write a dollar as code.",
            error,
            node.astext(),
            location=node,
        )
    raise nodes.SkipNode


def _numbered(node, formula):
    """The HTML of a formula with a label, such as `$$ ... $$ (1)`. Sphinx numbers these formulas on each page."""
    name, number = node["ids"][0], node["number"]
    link = (
        f'<a class="headerlink" href="#{name}" title="Link to this equation">#</a>'
    )
    return f'<div id="{name}"><span class="eqno">({number}){link}</span>{formula}</div>'


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.add_transform(extension.CellsInTabs)
    app.connect("env-before-read-docs", extension.run_cells)
    app.connect("source-read", extension.fill_gallery)
    app.connect("autodoc-process-docstring", docstrings.to_rst)
    app.connect("autodoc-skip-member", docstrings.skip_fields)
    app.connect("missing-reference", docstrings.public_reference)
