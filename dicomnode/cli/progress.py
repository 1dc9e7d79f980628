"""Progress of a running method on stderr; silent where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from deconv import Progress as Step

__all__ = ["method_progress"]


@contextmanager
def method_progress(console: Console) -> Iterator[Callable[[Step], None]]:
    """A bar that follows what is given to the function it yields."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("read", total=1)

        def follow(step: Step) -> None:
            bar.update(task, description=step.stage, completed=step.step, total=max(step.steps, 1))

        yield follow
