"""A progress bar on the terminal."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(num_steps: int, start: int, show: bool | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yields `(step, metrics) -> None`, which draws on standard error.

    Args:
      num_steps: where the bar ends.
      start: where it begins: steps taken by an earlier, interrupted run.
      show: None draws only in a terminal or a notebook; rich draws a bar elsewhere once, at its end.
    """
    if show is False:
        yield lambda step, metrics: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if show is None and not (console.is_terminal or console.is_jupyter):
        yield lambda step, metrics: None
        return

    text = "value {task.fields[value]:.4g}  hypergrad norm {task.fields[norm]:.3g}"
    columns = BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=num_steps, completed=start, value=float("nan"), norm=float("nan"))
        yield lambda step, metrics: progress.update(
            bar, completed=step, value=metrics["value"], norm=metrics["hypergrad_norm"]
        )
