"""The headline on the terminal: one line per cell."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sparsek.evaluation.plan import COLUMNS, DENSE
from vllm_sparsek.evaluation.results import Results, Summary

KEYS = ("length", "sparse", "budget", "arm")
HEADINGS = ("ppl\n+%", "last ¼\n+%", "RULER\n%", "worst task\n%", "density")
# columns; more than any table needs
_WIDEST = 1000


def percent(value: float | None, decimals: int = 0) -> str:
    """A share in per cent; ``n/a`` where there is none."""
    return "n/a" if value is None else f"{100 * value:.{decimals}f}"


def cells(summary: Summary) -> list[str]:
    """The columns of ``HEADINGS``."""
    return [
        percent(summary.increase, 2),
        percent(summary.increase_last, 2),
        percent(summary.ruler_relative),
        f"{summary.worst_task} {percent(summary.worst)}" if summary.worst_task else "n/a",
        "n/a" if summary.density is None else f"{summary.density:.2f}",
    ]


def keys(summary: Summary) -> tuple[str, str, str, str]:
    """The columns of ``KEYS``."""
    budget = "" if summary.budget is None else f"{summary.budget:.0%}"
    return str(summary.length), summary.column, budget, summary.arm


def ordered(results: Results) -> list[Summary]:
    """Dense first, then by column and budget, so that the arms stand below one another.

    An arm that a column cannot show has one line there, without a budget or figures.
    """
    summaries = results.summaries()
    for length in dict.fromkeys(summary.length for summary in summaries):
        for entry in results.unavailable:
            summaries.append(Summary(entry["arm"], None, entry["column"], length, None))
    order = (DENSE, *COLUMNS)
    return sorted(
        summaries, key=lambda s: (s.length, order.index(s.column), s.budget is None, s.budget)
    )


def notes(results: Results) -> list[str]:
    """What the figures do not say, one line each."""
    lines = ["RULER and worst: per cent of dense's score"]
    lines += [
        f"left out at {length}, dense itself scores below 20 %: {', '.join(tasks)}"
        for length, tasks in results.left_out().items()
    ]
    return lines + [
        f"n/a: {entry['arm']}, {entry['column']}: {entry['reason']}"
        for entry in results.unavailable
    ]


def show(results: Results, console: Console) -> None:
    """Print one table a length; the arms of a column and budget stand below one another."""
    summaries = ordered(results)
    for length in dict.fromkeys(summary.length for summary in summaries):
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=0,
            title=f"contexts of {length} tokens",
            title_justify="left",
        )
        table.add_column("sparse", no_wrap=True)
        table.add_column("arm", no_wrap=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        previous = None
        for summary in summaries:
            if summary.length != length:
                continue
            _, column, budget, arm = keys(summary)
            group = f"{column} {budget}".strip()
            if previous is not None and group != previous:
                table.add_section()
            table.add_row("" if group == previous else group, escape(arm), *cells(summary))
            previous = group
        # a table too wide is better wrapped by the terminal than squeezed by rich
        wide = console.options.update(width=_WIDEST)
        width = max(console.width, console.measure(table, options=wide).maximum)
        console.print(table, width=width, overflow="ignore", crop=False)
    for line in notes(results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
