"""Progress on the terminal: a spinner and a bar on a tty, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Shows the step under way and how many of `steps` are done. Use as a context manager."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._overall = self._bar.add_task("", total=steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def more(self, steps: int) -> None:
        """Raise the number of steps."""
        self._steps += steps
        self._bar.update(self._overall, total=self._steps)

    def say(self, line: str) -> None:
        """Print one line above the bar, never wrapped, so that it can be searched for."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str) -> Iterator[Callable[[], None]]:
        """Show a step while it lasts and how long it took; the value is to be called meanwhile."""
        started = time.monotonic()
        self._bar.update(self._overall, description=escape(label))
        yield self._bar.refresh
        self._bar.advance(self._overall)
        self.say(f"{label}  {time.monotonic() - started:.1f} s")
