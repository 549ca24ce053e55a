"""Progress of long work: a bar if stderr is a terminal, nothing otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, float | None], None]
"""Called with the current step and the part of the work that is done, 0 to 1; None if that is unknown."""


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a function that moves the bar."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield lambda text, done: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, done: bar.update(task, description=text, completed=done or 0.0, total=done and 1.0)
