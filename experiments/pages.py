"""Result pages. A page has a head, written by hand, and below it the result that its script writes.

The head has the question, the answer, a picture, and a small table. If the script draws no plot, the picture is a bar
chart of the small table:

    python experiments/pages.py unroll suggest:2      draws the first column of numbers of unroll.md, and column 2
"""

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MARK = "<!-- The script writes everything below this line. -->"


def head(text: str) -> str:
    """Returns the head of a page, or an empty string if the page has none."""
    before, mark, _ = text.partition(f"{MARK}\n")
    return before + mark if mark else ""


def write(path: Path, title: str, text: str, picture: str = "") -> None:
    """Writes a result below the head of its page. A new page begins with its title, and the picture if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = head(path.read_text()) if path.is_file() else ""
    if kept:
        print(f"The head of {path} was written for an earlier result: compare its numbers.", flush=True)
    shown = f"![{picture}]({path.stem}.png)\n\n" if picture else ""
    path.write_text(f"{kept}\n{text}" if kept else f"# {title}\n\n{shown}{text}")


def small_table(text: str) -> list[list[str]]:
    """Returns the cells of the table in the head of a page: the header, then the rows."""
    lines = [line for line in head(text).splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    return [row for row in rows if set(row) != {"---"}]


def numbers(cell: str) -> tuple[float, float] | None:
    """Returns the value of a cell and its deviation (0 without ±), or None if the cell has no number."""
    match = re.match(r"([+-]?[\d.,]*\d)%?(?: ± ([\d.]+))?", cell)
    return (float(match[1].replace(",", "")), float(match[2] or 0)) if match else None


def draw(name: str, column: int | None = None) -> None:
    """Draws a column of a page's small table as bars; by default the first one of numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    header, *rows = small_table((RESULTS / f"{name}.md").read_text())
    first = next(c for c in range(1, len(header)) if all(numbers(row[c]) for row in rows))
    column = column or first
    labels = [", ".join(row[:first]).replace("`", "") for row in rows]
    values, deviations = zip(*(numbers(row[column]) or (0, 0) for row in rows), strict=True)
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained")
    axes.barh(labels, values, xerr=deviations if any(deviations) else None, color="C0")
    axes.invert_yaxis()
    axes.set_xlabel(f"{header[column]} ({header[0]})" if header[0] else header[column])
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page, _, number = argument.partition(":")
        draw(page, int(number) if number else None)
