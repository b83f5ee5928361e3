"""The docstrings as reStructuredText.

They are plain text with `Args:`, `Returns:`, `Raises:`, `Attributes:` and `Example:`. An equation is an indented
paragraph, code is in single backticks, `- ` begins an item of a list, and tables and bold words are those of Markdown.
"""

import collections
import importlib
import inspect
import itertools
import re
import textwrap

import metaopt

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Examples):$")
_ENTRY = re.compile(
    r"^(\*{0,2}\w[\w., *]*): ?(.*)$"
)  # an indented line continues the entry above it
_BOLD = r"(?<![\w*])\*\*[^\s*`](?:[^*`]*[^\s*`])?\*\*"
_INLINE = re.compile(rf"{_BOLD}|`[^`]+`|https?://[^\s,;)]+")
_TABLE = re.compile(
    r"\|.*\|\n\|(?: *-+ *\|)+$"
)  # the head of a table in Markdown, and the line below it
_FIELD = type(collections.namedtuple("Pair", "first").first)


def to_rst(app, what, name, obj, options, lines):
    """Handles Sphinx's event `autodoc-process-docstring`: replaces `lines`."""
    room = name.split(".")[1] if name.count(".") else "base"
    lines[:] = converted(lines, room)


def skip_fields(app, what, name, obj, skip, options):
    """Handles `autodoc-skip-member`: the fields of a NamedTuple are under `Attributes:` of its docstring."""
    return True if isinstance(obj, _FIELD) else skip


def public_reference(app, env, node, contnode):
    """Handles `missing-reference`: `metaopt.nas._cells.Cell` is documented as `metaopt.nas.Cell`."""
    target = re.sub(r"\._\w+", "", node.get("reftarget", ""))
    if node.get("refdomain") != "py" or target == node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, contnode
    )


def converted(lines, room):
    """Returns the lines in reStructuredText; `room` is the one whose names need no prefix."""
    sections = [("", [])]
    for line in lines:
        header = _SECTION.match(line)
        ends = sections[-1][0] and line and not line[0].isspace()
        if header or ends:
            sections.append((header[1] if header else "", []))
        if not header:
            sections[-1][1].append(line)
    return [
        line
        for title, body in sections
        for line in (*_section(title, body, room), "")
    ]


def _section(title, body, room):
    body = textwrap.dedent("\n".join(body)).strip("\n").split("\n")
    if title == "Returns":
        return [":returns:", *_indented(_prose(body, room))]
    if title in ("Args", "Attributes", "Raises"):
        role = {"Args": "param", "Attributes": "ivar", "Raises": "raises"}[title]
        return [
            line
            for name, text in _entries(body)
            for line in _field(role, name, text, room)
        ]
    return _prose(body, room)


def _entries(body):
    """Pairs of a name and the lines of its text."""
    entries = []
    for line in body:
        entry = _ENTRY.match(line)
        if entry:
            entries.append((entry[1], [entry[2]]))
        elif entries:
            entries[-1][1].append(line)
    return entries


def _field(role, name, text, room):
    rest = textwrap.dedent("\n".join(text[1:])).split("\n") if text[1:] else []
    return [
        f":{role} {_escaped(name)}:",
        *_indented(_prose([text[0], *rest], room)),
    ]


def _indented(lines):
    return [f"  {line}" if line else "" for line in lines]


def _prose(lines, room):
    """Paragraphs, lists, tables, equations and doctests. An indented line directly below a paragraph belongs to it."""
    out, mode, lines = [], "text", _with_whole_code(lines)
    for i, line in enumerate(lines):
        if mode == "table" and line.startswith("|"):
            continue
        if mode != "doctest" and _TABLE.match("\n".join(lines[i : i + 2])):
            mode = "table"
            out += _table(
                itertools.takewhile(lambda row: row.startswith("|"), lines[i:]),
                room,
            )
            continue
        after_blank = i == 0 or not lines[i - 1].strip()
        item = re.match(r" *(- |\d+\. )", line)
        if not line.strip():
            mode = "text" if mode in ("doctest", "table") else mode
            out.append("")
            continue
        if line[0].isspace() and mode in ("doctest", "equation"):
            out.append(line)
            continue
        if line[0].isspace() and mode == "text" and after_blank:
            mode = "equation"
            out += ["::", "", line]
            continue
        if line.startswith(">>> ") and mode != "doctest":
            mode = "doctest"
            out.append("")
        elif not line[0].isspace() and mode != "doctest":
            mode = "list" if item else "text"
        if mode == "doctest":
            out.append(line)
            continue
        if (
            item
            and out
            and out[-1]
            and not re.match(r" *(- |\d+\. )", lines[i - 1])
            and mode == "list"
        ):
            out.append("")
        out.append(_inline(line.strip() if mode == "text" else line, room))
    return out


def _table(rows, room):
    """A table of Markdown as a directive. The second row, of dashes, only ends the head."""
    head, _, *body = (
        [cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows
    )
    items = [
        ("     - " if j else "   * - ") + _inline(cell, room)
        for row in (head, *body)
        for j, cell in enumerate(row)
    ]
    return [
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        *(item.rstrip() for item in items),
        "",
    ]


def _with_whole_code(lines):
    """Joins lines within which a line break splits code in backticks."""
    joined = []
    for line in lines:
        if joined and joined[-1].count("`") % 2:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return joined


def _inline(line, room):
    parts, end = [], 0
    for match in _INLINE.finditer(line):
        parts.append(_escaped(line[end : match.start()]))
        before, after = line[: match.start()], line[match.end() :]
        if match[0].startswith("**"):
            code = f"**{_escaped(match[0][2:-2])}**"
        else:
            code = (
                match[0]
                if match[0].startswith("http")
                else _code(match[0].strip("`").strip(), room)
            )
        # Markup begins after a space or an opening bracket, and ends before a space or punctuation.
        start = "\\ " * bool(re.search(r"[^\s(\[{<'\"/:-]$", before))
        parts.append(
            start + code + "\\ " * bool(re.match(r"[^\s)\]}>'\"/:.,;!?-]", after))
        )
        end = match.end()
    return "".join([*parts, _escaped(line[end:])])


def _escaped(text):
    return re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", text)


def _code(code, room):
    """A link to a public function or class, or a literal. A name without a room is of `room` or of `base`."""
    for path in [code] if "." in code else [f"{room}.{code}", f"base.{code}"]:
        owner, _, name = path.removeprefix("metaopt.").partition(".")
        if owner in _rooms() and _is_public(
            importlib.import_module(f"metaopt.{owner}"), name
        ):
            return f":py:obj:`{code} <metaopt.{owner}.{name}>`"
    return f"``{code}``"


def _is_public(module, name):
    """Whether it is a function or class that the reference lists. `base` has no `__all__`: all its own names are."""
    value = getattr(module, name, None)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return False
    return (
        name in module.__all__
        if hasattr(module, "__all__")
        else value.__module__ == module.__name__
    )


def _rooms():
    return [
        name
        for name in dir(metaopt)
        if inspect.ismodule(getattr(metaopt, name)) and name[0] != "_"
    ]
