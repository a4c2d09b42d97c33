"""The headline on the terminal: one line per cell."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sparsek.evaluation.results import Results, Summary

HEADINGS = (
    "ppl\n+%", "last ¼\n+%", "RULER\n% of dense", "worst\n% of dense", "worst task", "density",
)  # fmt: skip


def percent(value: float | None, decimals: int = 0) -> str:
    """A share in per cent; ``n/a`` where there is none."""
    return "n/a" if value is None else f"{100 * value:.{decimals}f}"


def cells(summary: Summary) -> list[str]:
    """The columns of ``HEADINGS``."""
    return [
        percent(summary.increase, 2),
        percent(summary.increase_last, 2),
        percent(summary.ruler_relative),
        percent(summary.worst),
        summary.worst_task or "n/a",
        "n/a" if summary.density is None else f"{summary.density:.2f}",
    ]


def notes(results: Results) -> list[str]:
    """What the table leaves out, one line each."""
    lines = [
        f"left out at {length}, dense itself scores below 20 %: {', '.join(tasks)}"
        for length, tasks in results.left_out().items()
    ]
    return lines + [
        f"n/a: {entry['arm']}, {entry['column']}: {entry['reason']}"
        for entry in results.unavailable
    ]


def show(results: Results, console: Console) -> None:
    """Print the summaries, grouped by length and column."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("length", "sparse", "budget", "arm"):
        table.add_column(name, no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    summaries = sorted(results.summaries(), key=lambda s: (s.length, s.column != "dense", s.column,
                                                            s.budget or 0.0))  # fmt: skip
    previous = None
    for summary in summaries:
        group = (summary.length, summary.column, summary.budget)
        if previous is not None and group != previous:
            table.add_section()
        budget = "" if summary.budget is None else f"{summary.budget:.0%}"
        first = group != previous
        previous = group
        table.add_row(
            str(summary.length) if first else "",
            summary.column if first else "",
            budget if first else "",
            escape(summary.arm),
            *cells(summary),
        )
    console.print(table, overflow="ignore", crop=False)
    for line in notes(results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
