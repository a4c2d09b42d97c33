"""Write what was measured: JSON and CSV after every run, plot and HTML page at the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vllm_sparsek.serving_bench.report import files, html, plot, table
from vllm_sparsek.serving_bench.results import Results
from vllm_sparsek.serving_bench.writing import write_atomically

JSON_NAME = "results.json"
CSV_NAME = "results.csv"
PLOT_NAME = "plot.png"
HTML_NAME = "report.html"


def save_data(results: Results, output: Path) -> None:
    """Write the JSON and the CSV."""
    files.write_json(results, output / JSON_NAME)
    files.write_csv(results, output / CSV_NAME)


def save_all(results: Results, output: Path) -> None:
    """Write JSON, CSV, PNG and HTML."""
    save_data(results, output)
    png = plot.render(results)
    write_atomically(output / PLOT_NAME, png)
    write_atomically(output / HTML_NAME, html.render(results, png).encode())


def show(results: Results, console: Console) -> None:
    """Print the table on the terminal."""
    table.show(results, console)
