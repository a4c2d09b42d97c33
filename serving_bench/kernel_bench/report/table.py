"""The tables on the terminal: one a case, and the tiers with pass or fail."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sparsek.serving_bench.kernel_bench import tiers
from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row

NONE = "-"
# a table wider than the terminal is better wrapped by it than squeezed by rich
LEAST_WIDTH = 140
HEADINGS = (
    "µs", "µs/(b·h)", "GB/s", "% copy", "TFLOP/s", "density", "max |diff|", "of allowed", "2e-3",
    "gate", "speed-up",
)  # fmt: skip


def _number(value: float | None, decimals: int) -> str:
    return NONE if value is None else f"{value:,.{decimals}f}"


def _cells(results: Results, row: Row) -> list[str]:
    """One row's figures, in the order of HEADINGS."""
    share, speedup = results.copy_share(row), results.speedup(row)
    within = NONE
    if row.user_bound is not None and row.max_diff is not None:
        within = "yes" if row.max_diff <= row.user_bound else "NO"
    return [
        _number(row.us, 1),
        _number(row.us_per_head, 3),
        _number(row.gb_per_s, 0),
        NONE if share is None else f"{100 * share:.0f} %",
        _number(row.tflops, 0),
        _number(row.density, 3),
        NONE if row.max_diff is None else f"{row.max_diff:.1e}",
        NONE if row.error_share is None else f"{100 * row.error_share:.0f} %",
        within,
        NONE if row.gate is None else "green" if row.gate else "RED",
        NONE if speedup is None else f"{speedup:.2f}x",
    ]


def _case(results: Results, rows: list[Row], console: Console) -> None:
    first = rows[0]
    against = f", speed-up over {first.against}" if first.against else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
    table.title = escape(f"{first.group}: {first.case}{against}")
    table.add_column("arm", no_wrap=True)
    for name in HEADINGS:
        table.add_column(name, justify="right", no_wrap=True)
    previous: str | None = None
    for row in rows:
        if row.budget is not None and row.budget != previous:
            table.add_section()
            table.add_row(escape(row.budget))
        previous = row.budget
        indent = "" if row.budget is None else "  "
        table.add_row(indent + escape(row.arm), *_cells(results, row))
    console.print(table)
    for reason, arms in _reasons(rows).items():
        console.print(escape(f"  {', '.join(arms)}: {reason}"), highlight=False, soft_wrap=True)


def _reasons(rows: list[Row]) -> dict[str, list[str]]:
    """Why arms have no result or a wrong one: arms by reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "ok" and row.gate is not False:
            continue
        what = "gate" if row.status == "ok" else row.status
        arms = found.setdefault(f"{what}: {row.reason}", [])
        if row.arm not in arms:
            arms.append(row.arm)
    return found


def _tiers(results: Results, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
    table.title = "tiers: selection and attention, µs per (batch x head)"
    for name in ("tier", "target", "density at least", "measured", "density", "budget", "speed-up",
                 "max |diff|", "", "why"):  # fmt: skip
        table.add_column(name, no_wrap=True)
    for outcome in tiers.judge(results):
        tier, row = outcome.tier, outcome.row
        table.add_row(
            outcome.name,
            f"{'≤' if tier.inclusive else '<'} {tier.us_per_head:.3f}",
            f"{tier.density:.2f}",
            _number(row.us_per_head if row else None, 3),
            _number(row.density if row else None, 3),
            (row.budget or "") if row else "",
            NONE if outcome.speedup is None else f"{outcome.speedup:.2f}x",
            NONE if row is None or row.max_diff is None else f"{row.max_diff:.1e}",
            "pass" if outcome.passed else "FAIL",
            escape(outcome.why),
        )
    console.print(table)


def show(results: Results, console: Console) -> None:
    """Print all cases in the order measured, the ceilings, then the tiers."""
    console.width = max(console.width, LEAST_WIDTH)
    for case_id in dict.fromkeys(row.case_id for row in results.rows):
        _case(results, [row for row in results.rows if row.case_id == case_id], console)
    copy, matmul = (results.ceilings.get(k) for k in ("copy_gb_per_s", "matmul_tflops"))
    console.print(
        f"{results.environment.get('device')}: copy {_number(copy, 0)} GB/s, "
        f"bf16 matmul {_number(matmul, 0)} TFLOP/s",
        highlight=False,
        soft_wrap=True,
    )
    if results.tiers:
        _tiers(results, console)
