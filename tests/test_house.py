"""Rules for the whole tree: imports point down, public names have docstrings and are on a page, and files agree."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Protocol

import measures
import pytest

import metaopt
from metaopt import base

pytestmark = pytest.mark.once  # these rules do not depend on the version of Python

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"base"},
    {"_trees"},
    {"_jaxpr"},
    {
        "_checks",
        "_explained",
        "_extras",
        "_files",
        "_heads",
        "_cache",
        "_locks",
        "_logs",
        "_pareto",
        "_permutations",
        "_progress",
        "_proposals",
        "_schedule_free",
        "_tfrecord",
        "_tuned_space",
    },
    {"_saving", "_batches"},
    {"_row_embedding"},
    {"spaces"},
    {"transforms"},
    {"tasks", "inner"},
    {"hypergrad", "predictors"},
    {"training", "evaluation"},
    {"few_shot", "blackbox"},
    {"nas"},
    {"automl"},
    {"plots", "_doctor"},
    {"_cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The searcher of cells and the plots of searches read records in the same way as `blackbox`.
SHARED = {
    "metaopt.nas.search._cell_searcher": ("_earlier_trials", "_new_task"),
    "metaopt.nas.search._train_cell_searcher": ("_earlier_trials", "_new_trials", "_surrogates"),
    "metaopt.plots._searches": ("_earlier_trials", "_goals"),
}
MODULES = sorted((ROOT / "metaopt").rglob("*.py"))
ROOMS = sorted(p.parent.name for p in MODULES if p.name == "__init__.py" and p.parent.parent == ROOT / "metaopt")


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree):
    """The dotted names that a module's `import` statements bring in, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults_of_imports(name, source):
    """The errors of the imports of module `name`, as text."""
    room = name.split(".")[1]
    faults = []
    for target in imports(ast.parse(source)):
        package, *path = target.split(".")
        if package != "metaopt":
            continue
        if not path or path[0] not in LEVEL:
            faults.append(f"{name} imports {target}, which is no room")
        elif path[0] != room and LEVEL[path[0]] >= LEVEL[room]:
            faults.append(f"{name} imports {target}, which is not below it")
        elif path[0] != room and any(p.startswith("_") and p not in SHARED.get(name, ()) for p in path[1:]):
            faults.append(f"{name} imports {target}, a private file of another room")
    return faults


def test_imports_point_down():
    files = [f for f in MODULES if f.parent.name != "metaopt" or f.stem != "__init__"]
    faults = [fault for file in files for fault in faults_of_imports(name_of(file), file.read_text())]
    assert len(files) > 50 and faults == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from metaopt import training", "not below"),
        ("from metaopt import predictors", "not below"),
        ("def f():\n    import metaopt.training", "not below"),
        ("from metaopt.inner import _loop", "private"),
        ("from metaopt.inner._loop import step", "private"),
        ("import metaopt", "no room"),
        ("from metaopt import utils", "no room"),
    ],
)
def test_imports_that_do_not_point_down_are_seen(source, fault):
    (message,) = faults_of_imports("metaopt.hypergrad._new", source)
    assert fault in message


def test_functions_and_files_are_short():
    """Without docstrings below 80 lines; files below 500."""
    functions = [f for folder in ("metaopt", "experiments") for f in measures.functions(folder)]
    long_functions = [f for f in functions if f.lines >= 80]
    long_files = [
        name
        for folder in ("metaopt", "experiments")
        for name, text in measures.files(folder).items()
        if text.count("\n") >= 500
    ]
    assert max(functions).lines > 20 and long_functions == long_files == []


def public_names():
    for room in [*ROOMS, "base", "_checks", "_jaxpr", "_permutations", "_tfrecord"]:
        module = importlib.import_module(f"metaopt.{room}")
        names = getattr(
            module, "__all__", [n for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"]
        )
        for name in names:
            value = getattr(module, name)
            if inspect.isroutine(value) and not inspect.getmodule(value).__name__.startswith(f"metaopt.{room}"):
                continue  # typing's and others', in a module without `__all__`
            yield f"{room}.{name}", value


def faults_of_docstring(value):
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        return []  # a constant or an alias of a type has a comment
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        generated = text.startswith(f"{value.__name__}(")  # the default of a NamedTuple
        inherited = text in (inspect.getdoc(tuple), inspect.getdoc(Protocol))
        return ["no docstring"] if generated or not text or inherited else []
    signature = inspect.signature(value)
    faults = [] if text else ["no docstring"]
    for parameter in signature.parameters.values():
        if "Args:" not in text or not re.search(rf"^ *\*{{0,2}}{parameter.name}: ", text, re.MULTILINE):
            faults.append(f"`{parameter.name}` is not under Args")
    if signature.return_annotation not in (None, signature.empty) and "Returns:" not in text:
        faults.append("what it returns is not under Returns")
    body = inspect.getsource(value).replace(value.__doc__ or "", "")
    if re.search(r"\braise \w+Error|base\.check_|\b_check\w*\(", body) and "Raises:" not in text:
        faults.append("what it raises is not under Raises")
    return faults


def test_each_public_name_lives_in_one_room():
    names = [name for room in ROOMS for name in getattr(importlib.import_module(f"metaopt.{room}"), "__all__", [])]
    assert len(names) > 300 and len(set(names)) == len(names)


def test_every_public_name_has_a_docstring():
    names = dict(public_names())
    faults = {name: faults_of_docstring(value) for name, value in names.items()}
    assert len(names) > 200 and {name: names for name, names in faults.items() if names} == {}


def test_docstrings_that_lack_something_are_seen():
    def nothing(x: int) -> int:
        return x

    def half(x: int, y: int) -> int:
        """Adds.

        Args:
          x: one.
        """
        if x < 0:
            raise ValueError("x")
        return x + y

    class Bare(Protocol):
        def __call__(self) -> int: ...

    assert faults_of_docstring(Bare) == ["no docstring"]
    assert faults_of_docstring(nothing) == [
        "no docstring",
        "`x` is not under Args",
        "what it returns is not under Returns",
    ]
    assert faults_of_docstring(half) == [
        "`y` is not under Args",
        "what it returns is not under Returns",
        "what it raises is not under Raises",
    ]


def run_python(code, **kwargs):
    """In a fresh process, as a person has it: float32, without this suite's settings."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, **kwargs)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_metaopt_loads_no_extra_and_nothing_slow():
    slow = ("tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "pandas", "orbax", "optuna", "metaopt.plots")
    assert run_python(f"import metaopt, sys; print([m for m in {slow} if m in sys.modules])").strip() == "[]"
    # Nor does what draws, until it draws.
    assert (
        run_python("import metaopt, sys; metaopt.plots.comparison; print('matplotlib' in sys.modules)").strip()
        == "False"
    )


# Cells of the site (`{code-cell}`) run when it is built; see CONTRIBUTING.md.
DOCS = [file for pattern in ("*.md", "[!_]*/*.md") for file in sorted((ROOT / "docs").glob(pattern))]
PAGES = [ROOT / "README.md", *DOCS, ROOT / "experiments" / "README.md"]


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# The pages of one process share imports and compiled programs, and no names.
RUN_PAGES = """
import json, os, sys
from metaopt import hypergrad
recommend = hypergrad.recommend
def with_one_rule(problem, *args, num_steps, **kwargs):
    # All rules would compile for a minute (`test_recommend` has them).
    rules = {"unrolled": hypergrad.unrolled(problem, num_steps=num_steps)}
    return recommend(problem, *args, **{"num_steps": num_steps, "rules": rules} | kwargs)
hypergrad.recommend = with_one_rule
for name, code in json.load(sys.stdin).items():
    print("\\f" + name, flush=True)
    os.mkdir(name)
    os.chdir(name)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    os.chdir("..")
"""


@pytest.mark.parametrize("part", range(2))  # the pages of two processes take equally long
def test_the_python_blocks_of_pages_run(part, tmp_path):
    pages = {page.stem: page for page in PAGES if python_blocks(page)}
    names = [name for i, name in enumerate(sorted(pages)) if i % 2 == part]
    blocks = json.dumps({name: "\n".join(python_blocks(pages[name])) for name in names})
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    printed = run_python(RUN_PAGES, cwd=tmp_path, env=environment, input=blocks)
    _, *parts = printed.split("\f")
    assert len(parts) == len(names) > 3
    for name, text in zip(names, parts, strict=True):
        assert text.startswith(name) and text.removeprefix(name).strip() and "nan" not in text, name
    if "README" in names:
        text = parts[names.index("README")]
        assert re.search(r"^\* unrolled +exact", text, re.M)
        shown = re.findall(r"```text\n(.*?)```", pages["README"].read_text(), re.DOTALL)
        assert len(shown) == 2 and all(output in text for output in shown)


HOME = {"hypergrad": "rules.md", "few_shot": "few_shot.md"}  # pages that name the functions of a room without the room


def documented_names(pages):
    """The names, such as "nas.darts", in the code of pages: {name of the file: text}."""
    names = set()
    for page, text in pages.items():
        blocks, rest = re.findall(r"```.*?```", text, re.DOTALL), re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        spans = re.findall(r"`([^`]+)`", rest)
        names |= set(re.findall(r"\b[a-z_]+\.\w+", "\n".join(blocks + spans)))
        names |= {f"{room}.{span}" for room, home in HOME.items() if home == Path(page).name for span in spans}
    return names


def public_names_of_rooms():
    """The public names of the rooms, the contract and the top, with their values."""
    for room in [*(room for room in ROOMS if room[0] != "_"), "base", "metaopt"]:
        module = metaopt if room == "metaopt" else importlib.import_module(f"metaopt.{room}")
        names = getattr(module, "__all__", [n for n, v in vars(module).items() if inspect.isclass(v) and n[0] != "_"])
        for name in names:
            value = getattr(module, name)
            if inspect.getmodule(value) is value or room == "metaopt" and hasattr(base, name):
                continue  # a room, or a name of `base`
            if getattr(value, "__module__", "metaopt").startswith("metaopt"):
                yield f"{room}.{name}", value


def undocumented_names(pages):
    """The public names that no page mentions."""
    documented = documented_names(pages)
    return [name for name, _ in public_names_of_rooms() if name not in documented]


def test_pages_are_short():
    """README below 12 kB, changelog below 3 kB, other pages below 500 lines."""
    limits = {"README.md": 12_000, "CHANGELOG.md": 3_000}
    sizes = {name: len((ROOT / name).read_bytes()) for name in limits}
    long_pages = {page.name: page.read_text().count("\n") for page in DOCS if page.read_text().count("\n") >= 500}
    assert len(DOCS) > 40 and all(100 < sizes[name] < limit for name, limit in limits.items()) and long_pages == {}


def test_a_page_mentions_every_public_name():
    pages = {file.name: file.read_text() for file in (ROOT / "README.md", *DOCS) if file.parent.name != "reference"}
    assert undocumented_names(pages) == []
    missing = set(undocumented_names({"a.md": "`nas.darts_space(3)`, and spaces.real in prose"}))
    assert missing >= {"nas.darts", "spaces.real", "base.Task", "metaopt.save"} and "nas.darts_space" not in missing


# Their examples would need files or packages that the tests do not have; other tests call them with small files.
WITHOUT_EXAMPLE = {
    *(f"nas.read_nas_bench_{name}" for name in ("101", "201", "301")),
    "tasks.from_tfds",
    "tasks.from_meta_dataset",
}


def test_the_theory_names_every_rule():
    tools = {"Solver", "check", "diagnose", "flops", "recommend", "trace"}
    text = (ROOT / "docs" / "theory.md").read_text()
    assert [name for name in metaopt.hypergrad.__all__ if name not in tools and f"`{name}`" not in text] == []


def names_in_examples(page):
    """Names such as "nas.darts" in the code of a page that a build or a test runs."""
    code = "\n".join(re.findall(r"```(?:python|\{code-cell\} python3)\n(.*?)```", page, re.DOTALL))
    code += "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", page, re.MULTILINE))
    imported = re.findall(r"from metaopt\.(\w+) import (.+)", code)
    return {
        *re.findall(r"(?<![\w.])([a-z_]+\.\w+)", code.replace("metaopt.", "")),
        *re.findall(r"(?<![\w.])(metaopt\.\w+)", code),
        *(f"{room}.{name}" for room, names in imported for name in re.findall(r"\w+", names)),
    }


def types_in(annotation):
    """The classes of an annotation, such as those of `tuple[Table, ...] | None`."""
    arguments = getattr(annotation, "__args__", ())
    return {annotation} if inspect.isclass(annotation) and not arguments else set().union(*map(types_in, arguments))


def without_example(names, pages):
    """The public names that no page shows in code that runs.

    A type that a function returns, or that a field of such a type holds, needs no code of its own: some page must have
    both its name and code with the function. A protocol only needs its name on a page, because any function with its
    signature is an example.
    """
    examples = {page: names_in_examples(text) for page, text in pages.items()}
    named = {page: documented_names({page: text}) for page, text in pages.items()}
    makers = {}
    for name, value in names.items():
        if inspect.isroutine(value):
            for kind in types_in(inspect.signature(value).return_annotation):
                fields = [types_in(hint) for hint in getattr(kind, "__annotations__", {}).values()]
                for each in {kind, *set().union(*fields)}:
                    makers.setdefault(each, set()).add(name)

    def is_shown(name, value, page):
        made = inspect.isclass(value) and (
            getattr(value, "_is_protocol", False) or makers.get(value, set()) & examples[page]
        )
        return name in examples[page] or name in named[page] and made

    return {name for name, value in names.items() if not any(is_shown(name, value, page) for page in pages)}


def test_every_public_name_has_an_example_that_runs_on_a_page():
    files = [*PAGES, ROOT / "metaopt" / "transforms" / "README.md"]
    names = dict(public_names_of_rooms())
    missing = without_example(names, {str(file.relative_to(ROOT)): file.read_text() for file in files})
    assert len(names) > 330 and missing == WITHOUT_EXAMPLE
    page = "```python\nmetaopt.save(nas.darts)\n```\n`nas.gdas`\n>>> from metaopt.spaces import real, positive\n"
    assert names_in_examples(page) >= {"metaopt.save", "nas.darts", "spaces.real", "spaces.positive"}
    assert "nas.gdas" not in names_in_examples(page)
    some = {name: names[name] for name in ("nas.darts", "nas.Search", "nas.Supernet", "nas.gdas", "base.AskFn")}
    prose = "`nas.Search`, `nas.Supernet`, `base.AskFn`"
    assert without_example(some, {"a.md": page + prose}) == {"nas.gdas"}
    assert without_example(some, {"a.md": page, "b.md": prose}) == {"nas.gdas", "nas.Search", "nas.Supernet"}


FORMER_ROOMS = ("methods", "integrations", "rewrite", "progress")


def exists(path):
    """Whether a dotted name below `metaopt` is an attribute, or a field of a class."""
    value = metaopt
    for name in path.split("."):
        is_field = name in getattr(value, "__annotations__", ())
        if not hasattr(value, name):
            return is_field
        value = getattr(value, name)
    return True


def stale_names(text):
    """Names of a room, such as `nas.darts`, that a text has in backticks or code, and that do not exist."""
    for code in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL):
        for path in re.findall(r"(?<![\w./])[a-z_]+(?:\.[A-Za-z_]\w*)+", code):
            room = path.split(".")[0]
            is_stale = room in (*ROOMS, "base", "metaopt") and not exists(path.removeprefix("metaopt."))
            if not path.endswith(".py") and (is_stale or room in FORMER_ROOMS):
                yield path


def test_names_in_backticks_exist():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "metaopt" / "transforms" / "README.md"]
    texts = {page: page.read_text() for page in pages}
    for file in MODULES:
        strings = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        texts[file] = "\n\n".join(text for text in strings if isinstance(text, str) and "`" in text)
    stale = {str(file.relative_to(ROOT)): list(stale_names(text)) for file, text in texts.items()}
    assert {file: names for file, names in stale.items() if names} == {}
    text = "`nas.darts(x)`, `base.Task.train`, `metaopt.save`; `nas.to_json`, `methods.maml`, `metaopt.base.Task.test`"
    assert list(stale_names(text)) == ["nas.to_json", "methods.maml", "metaopt.base.Task.test"]


def test_links_of_pages_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    broken = [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert len(links) > 20 and broken == []


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    for name in ("run", "test"):
        start, end = (f"<!-- {name}:{edge} -->" for edge in ("start", "end"))
        assert text.count(start) == text.count(end) == 1 and text.index(start) < text.index(end)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_one():
    assert metaopt.__version__ == project()["project"]["version"]


def test_the_wheel_says_that_it_is_typed():
    # hatchling takes every file below the packages that git does not ignore.
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["metaopt"] and not {"exclude", "only-include"} & set(wheel)
    assert (ROOT / "metaopt" / "py.typed").is_file()
    assert "py.typed" not in (ROOT / ".gitignore").read_text()


# Written so that they do not find themselves.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.:/])/(?:home|root|work|Users|tmp|mnt|opt)/\w",
    "pickle": r"pickle\.load|allow_pickle\s*=\s*Tru[e]",
    "the host of a package registry": r"pyp[i]\.(?:org|python)|python(?:hosted)\.or[g]|anacond[a]\.or[g]",
}


def faults_of_text(text):
    return [fault for fault, pattern in FORBIDDEN.items() if re.search(pattern, text)]


SUFFIXES = {"", ".py", ".md", ".toml", ".ipynb", ".csv", ".json", ".sh"}


def text_files():
    for folder in ("metaopt", "tests", "experiments", "docs", "colab", ".ci", "."):
        pattern = "*" if folder == "." else "**/*"
        for file in sorted((ROOT / folder).glob(pattern)):
            if (
                file.is_file() and file.name != ".git" and file.suffix in SUFFIXES and "_build" not in file.parts
            ):  # `.git` of a worktree is a file
                yield file


def test_no_machine_paths_no_pickle():
    files = list(text_files())
    assert {"run", "README.md", "base.py"} <= {file.name for file in files}
    faults = {str(file.relative_to(ROOT)): faults_of_text(file.read_text()) for file in files if file != Path(__file__)}
    assert {name: texts for name, texts in faults.items() if texts} == {}


@pytest.mark.parametrize(
    "text",
    [
        "open('/" + "home/me/x')",
        'DATA = "/' + 'work/data"',
        "np.load(f, allow_pickle=True)",
        "pickle.load(f)",
        "https://" + "pypi" + ".org/x",
    ],
)
def test_machine_paths_and_pickles_are_seen(text):
    assert faults_of_text(text)
