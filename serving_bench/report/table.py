"""The table on the terminal, split into blocks of columns where one line is too narrow."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sparsek.serving_bench.results import Column, Results, columns

# " | " between columns
_GAP = 3


def _heading(column: Column) -> str:
    return f"{column.heading}\n{column.unit}" if column.unit else column.heading


def _blocks(
    rows: list[dict[str, object]], columns: tuple[Column, ...], width: int
) -> list[list[Column]]:
    """Spread the columns over as few tables as fit `width` characters."""
    keys = sum(max(len(str(row[key])) for row in rows) + _GAP for key in ("workload", "arm")) + 1
    blocks: list[list[Column]] = [[]]
    used = keys
    for column in columns:
        cells = [*_heading(column).split("\n"), *(column.show(row) for row in rows)]
        need = max(map(len, cells)) + _GAP
        if blocks[-1] and used + need > width:
            blocks.append([])
            used = keys
        blocks[-1].append(column)
        used += need
    return blocks


def show(results: Results, console: Console) -> None:
    """Print the medians, grouped by workload so that the arms stand below one another."""
    order = {name: i for i, name in enumerate(results.workloads)}
    rows = sorted(results.summary(), key=lambda row: order.get(row["workload"], len(order)))
    if not rows:
        return
    for block in _blocks(rows, columns(results), console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("workload", no_wrap=True)
        table.add_column("arm", no_wrap=True)
        for column in block:
            table.add_column(_heading(column), justify="right", no_wrap=True)
        previous = None
        for row in rows:
            if previous is not None and row["workload"] != previous:
                table.add_section()
            shown = "" if row["workload"] == previous else row["workload"]
            previous = row["workload"]
            mark = " !" if row["failed"] else ""
            cells = [column.show(row) for column in block]
            table.add_row(escape(shown), escape(row["arm"]) + mark, *cells)
        # a table too wide by a word is better cut by the terminal than squeezed by rich
        console.print(table, overflow="ignore", crop=False)
