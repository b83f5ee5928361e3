"""Parts of the site that Sphinx does not have: cells within tabs, cells on all cores, and the gallery of results."""

import contextlib
import gc
import itertools
import multiprocessing.connection
import os
import re
import signal
import tempfile
import time
import warnings
from pathlib import Path

import jupyter_cache
import nbformat
from docutils import nodes
from ipykernel.inprocess.ipkernel import InProcessKernel
from ipykernel.inprocess.manager import InProcessKernelManager
from ipykernel.zmqshell import ZMQInteractiveShell
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import create_nb_reader
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from traitlets.config import Config

IGNORED_WARNINGS = (
    # Of tqdm, which Optuna imports, and of rich. Both would like ipywidgets.
    "IProgress not found",
    'install "ipywidgets"',
    # If two pages compile a program at the same time. Then JAX compiles it again.
    "Error reading persistent compilation cache entry",
)
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


def run_cells(app, env, docnames):
    """Handles `env-before-read-docs`: runs the cells of the pages that have changed, and caches their outputs.

    MyST-NB finds them in the cache when Sphinx reads the pages. With one process, it runs the cells itself, in kernels.
    Here each page runs in a fork of this process, which has already imported what most pages import. Each core has one
    fork at a time: two forks on two cores would spend a quarter of their time in threads that wait for one another.
    Settings that a page has for MyST-NB, and tags such as `raises-exception`, have no effect.
    """
    config, pages = env.mystnb_config, []
    if app.parallel < 2 or config.execution_mode != "cache":
        return
    for page in map(Path, map(env.doc2path, docnames)):
        text = page.read_text()
        reader = create_nb_reader(str(page), env.myst_config, config, text)
        if reader and not any(map(page.match, config.execution_excludepatterns)):
            pages.append((text.count("{code-cell}"), page, reader.read(text)))
    # long ones first, so that all cores end together
    pages.sort(key=lambda page: -page[0])
    cache = jupyter_cache.get_cache(config.execution_cache_path)
    cores, running = _cores(app.parallel), {}
    gc.freeze()  # forks need not look for cycles among these objects
    try:
        for _, page, notebook in pages:
            with contextlib.suppress(KeyError):
                cache.match_cache_notebook(notebook)
                continue
            if not cores:
                cores.append(_end_one(running))
            arguments = page, notebook, cores[-1], config
            process = multiprocessing.get_context("fork").Process(
                target=_run, args=arguments
            )
            process.start()
            running[process.sentinel] = page, process, cores.pop()
        while running:
            _end_one(running)
    finally:
        for _, process, _ in running.values():  # after an error
            process.terminate()
            process.join()


def _cores(num):
    """Returns the cores of `num` processes, or None for each where a process cannot choose."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * num
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return list(itertools.islice(cores, num))


def _end_one(running):
    """Waits until a process ends, and returns its core."""
    page, process, core = running.pop(multiprocessing.connection.wait(running)[0])
    process.join()
    if process.exitcode == -signal.SIGALRM:
        raise ExtensionError(
            f"{page}: a cell ran longer than `nb_execution_timeout`"
        )
    if process.exitcode:
        raise ExtensionError(
            f"{page}: a cell failed (exit code {process.exitcode})"
        )
    return core


def _run(page, notebook, core, config):
    """Runs the cells of a page in this process, adds their outputs to the cache, and ends the process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    history = Config({"HistoryManager": {"hist_file": ":memory:"}})
    manager = InProcessKernelManager(config=history)
    manager.kernel = InProcessKernel(
        parent=manager,
        session=manager.session,
        shell_class=ZMQInteractiveShell,  # by its name, rich recognizes a notebook
    )
    notebook.metadata["language_info"] = manager.kernel.language_info
    client, start = manager.client(), time.perf_counter()
    client.start_channels()
    with tempfile.TemporaryDirectory() as folder, _files() as files:
        os.chdir(folder)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                signal.alarm(config.execution_timeout)  # ends this process
                cell.outputs = _outputs(client, cell.source, files)
        os.chdir(page.parent)
    signal.alarm(0)
    # a process that ends in between would leave half an entry
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    seconds = {"execution_seconds": time.perf_counter() - start}
    jupyter_cache.get_cache(config.execution_cache_path).cache_notebook_bundle(
        CacheBundleIn(notebook, str(page), data=seconds),
        check_validity=False,
        overwrite=True,
    )
    os._exit(0)  # does not wait for threads and processes of the cells


@contextlib.contextmanager
def _files():
    """Sends what libraries and processes write to standard output and error to files, and returns these by name."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield {"stdout": out, "stderr": err}
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)


def _outputs(client, source, files):
    """Runs the code of a cell, and returns its outputs."""
    client.execute(source)
    outputs = []
    while client.iopub_channel.msg_ready():
        message = client.iopub_channel.get_msg()
        if message["msg_type"] == "error":
            raise RuntimeError("\n".join(message["content"]["traceback"]))
        if message["msg_type"] in ("stream", "display_data", "execute_result"):
            outputs.append(nbformat.v4.output_from_msg(message))
    for name, file in files.items():
        file.seek(0)
        if text := file.read().decode():
            outputs.append(nbformat.v4.new_output("stream", name=name, text=text))
            file.seek(0)
            file.truncate()
    return outputs


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
    minutes = "a few minutes" if minutes == "minutes" else f"minutes: {minutes}"
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
