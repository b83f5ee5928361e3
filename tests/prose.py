"""Measures how plain the prose is: docstrings, comments, messages of errors, and pages."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

# Turns of phrase that plain technical English rarely has.
UNUSUAL = re.compile(
    "|".join(
        [
            r"(?<!\bof )\bwhat (?:is|are|was|were|it|they|one|a|an|the|has|have)\b",
            r"(?<!\bof )\bwhat (?:comes|came|remains|others|training|users?)\b",
            r"\b(?:is|are|was|were) none\b",
            r"\b(?:is|are|was|were) no (?!longer|more)\w+",
            r"\b(?:that|which|who) (?:is|are|has|have) no\b",
            r"\b\w+ alone\b",
            r"\btold\b|\btells? (?:of|what|which|how|whether|it)\b",
            r"\bbeside\b",
            r"\bone's own\b|\bof (?:his|their|its|your) own\b",
            r"\banew\b|\bas well as\b(?= may)|\bin the place of\b|\bthat stands?\b|\bstands? (?:in|beside|there)\b",
            r"^(?:Of|In the place of|With what|By what|To what) (?:a|an|the|methods|what|all|those)\b",
            r"\bis asked\b|\bare asked\b|\bmay be asked\b",
            r"\brefuses? (?:what|an argument|a \w+ that)\b",
        ]
    ),
    re.IGNORECASE | re.MULTILINE,
)
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def texts(path: Path) -> Iterator[str]:
    """Everything in a file that a person reads. Code blocks and tables of pages do not count."""
    source = path.read_text()
    if path.suffix == ".md":
        blocks = re.split(r"\n\s*\n", re.sub(r"```.*?```", "", source, flags=re.DOTALL))
        yield from (block for block in blocks if not block.lstrip().startswith("|"))
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Raise):
            parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
            yield from (part for part in parts if isinstance(part, str) and len(part) > 20)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and len(token.string) > 12:
            yield token.string.lstrip("# ")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text. Doctests do not count, and code counts as one word."""
    text = re.sub(r"^\s*(?:>>>|\.\.\.) .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"``?[^`]*``?", "X", text)
    for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z`(\"])|\n\s*\n|\n(?=\s*(?:[-*]|\w+:) )", text):
        yield " ".join(part.split())


def measure(paths: Iterable[Path]) -> tuple[float, float]:
    """Unusual turns of phrase per 1,000 words, and the share of sentences above 30 words."""
    parts = [part for path in paths for text in texts(path) for part in sentences(text) if part]
    lengths = [len(WORD.findall(part)) for part in parts]
    turns = sum(len(UNUSUAL.findall(part)) for part in parts)
    return 1000 * turns / sum(lengths), sum(n > 30 for n in lengths) / len(lengths)
