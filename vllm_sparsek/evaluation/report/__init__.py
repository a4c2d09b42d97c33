"""The report of an evaluation: JSON, CSV, plots, an HTML page, a table on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vllm_sparsek.evaluation.report import files, html, plot, table
from vllm_sparsek.evaluation.results import Results
from vllm_sparsek.serving_bench.writing import write_atomically

HTML_NAME = "report.html"


def save_data(results: Results, output: Path) -> None:
    """Write JSON and CSV."""
    files.write(results, output)


def save_all(results: Results, output: Path) -> None:
    """Write JSON, CSV, plots and HTML."""
    save_data(results, output)
    pngs = plot.render(results)
    for name, png in pngs.items():
        write_atomically(output / name, png)
    write_atomically(output / HTML_NAME, html.render(results, pngs).encode())


def show(results: Results, console: Console) -> None:
    """Print the headline on the terminal."""
    table.show(results, console)
