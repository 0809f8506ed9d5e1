"""Show bars for long steps on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from comq_onnx.context import Progress as Update

# steps of which only a share is known
SHARES = ("survey", "stages")


class _DoneColumn(MofNCompleteColumn):
    """Show how much of a step is done: a count, or a share in percent."""

    def render(self, task: Task) -> Text:
        if task.description in SHARES:
            return Text(f"{task.percentage:.0f}%", style="progress.percentage")
        return super().render(task)


@contextlib.contextmanager
def shown_progress(console: Console, quiet: bool) -> Iterator[Update]:
    """Show one bar for each long step with the time left, on a terminal; nothing elsewhere, or if quiet.

    Yields the function to call with the name of a step, how much of it is done, and how much there is.
    """
    bars = Progress(
        TextColumn("{task.description:>8}"), BarColumn(), _DoneColumn(), TimeRemainingColumn(),
        # stages take from a second to many minutes: the speed is the mean over all so far
        speed_estimate_period=24 * 3600,
        console=console, disable=quiet or not console.is_terminal, transient=True,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def update(what: str, done: int, total: int) -> None:
        if what in tasks and done < bars.tasks[tasks[what]].completed:
            bars.reset(tasks[what], total=total)
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        yield update
