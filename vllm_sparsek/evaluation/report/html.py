"""The HTML page: headline, every task's score, plots and settings in one file."""

from __future__ import annotations

from typing import Any

from vllm_sparsek.evaluation.report import table
from vllm_sparsek.evaluation.results import Results, Row
from vllm_sparsek.serving_bench.report.html import embedded, page, shown_as_yaml


def _score(row: Row | None) -> tuple[str, str]:
    """A cell of the table of tasks, and what it tells when pointed at."""
    if row is None:
        return "n/a", ""
    if row.measure == "score":
        text = f"{100 * row.value:.0f}"
    else:
        text = f"{100 * row.value:+.2f}"
    if row.low is None or row.high is None:
        return text, f"n = {row.n}"
    return text, f"95 %: {100 * row.low:.2f} to {100 * row.high:.2f}, n = {row.n}"


def _details(results: Results) -> tuple[list[str], list[dict[str, Any]]]:
    """Headings and rows of the table of tasks: scores and increases of perplexity, in per cent."""
    shown = [row for row in results.rows if row.measure in ("score", "increase")]
    names = list(dict.fromkeys(row.task for row in shown))
    rows = []
    for summary in table.ordered(results):
        mine = {
            row.task: row
            for row in shown
            if (row.arm, row.budget, row.column, row.length)
            == (summary.arm, summary.budget, summary.column, summary.length)
        }
        scores = [_score(mine.get(name)) for name in names]
        rows.append({"keys": table.keys(summary), "scores": scores})
    return names, rows


def render(results: Results, pngs: dict[str, bytes]) -> str:
    """Return the page."""
    names, details = _details(results)
    return page(
        __package__,
        "report.html.j2",
        results,
        keys=table.KEYS,
        headings=[heading.replace("\n", " ") for heading in table.HEADINGS],
        rows=[
            {"keys": table.keys(summary), "cells": table.cells(summary)}
            for summary in table.ordered(results)
        ],
        names=names,
        details=details,
        notes=table.notes(results),
        pngs={name: embedded(png) for name, png in pngs.items()},
        arms=shown_as_yaml({name: settings or {} for name, settings in results.arms.items()}),
        settings=shown_as_yaml({"evaluation": results.settings}),
    )
