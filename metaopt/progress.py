"""A progress bar on the terminal."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(
    total: float, show: bool | None, text: str, *, start: int = 0, **fields: Any
) -> Iterator[Callable[..., None]]:
    """A bar on standard error, and a text beside it.

    Args:
      total: where the bar ends.
      show: None draws only in a terminal or a notebook; rich draws a bar elsewhere once, at its end.
      text: beside the bar, with places such as "{task.fields[loss]:.3g}".
      start: where it begins: what an earlier, interrupted run has done.
      **fields: what stands in these places at first.

    Returns:
      A context manager of `(completed, **fields) -> None`, which draws.
    """
    if show is False:
        yield lambda completed, **fields: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if show is None and not (console.is_terminal or console.is_jupyter):
        yield lambda completed, **fields: None
        return

    columns = BarColumn(), MofNCompleteColumn(), TextColumn(text, markup=False), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total, completed=start, **fields)
        yield lambda completed, **fields: progress.update(bar, completed=completed, **fields)
