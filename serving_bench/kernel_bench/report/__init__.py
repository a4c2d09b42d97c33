"""What is left of a run: JSON and CSV, the tables on the terminal, the roofline plot.

The data need nothing beside vLLM's own dependencies; tables and plot need the extra `bench`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench.results import Results
from vllm_sparsek.serving_bench.writing import write_atomically, write_rows

JSON_NAME = "kernels.json"
CSV_NAME = "kernels.csv"
PLOT_NAME = "roofline.png"


def save_data(results: Results, output: Path) -> None:
    """Write JSON and CSV."""
    content = json.dumps(results.to_json(), indent=1) + "\n"
    write_atomically(output / JSON_NAME, content.encode())
    environment = results.environment
    about: dict[str, Any] = {
        **results.ceilings,
        "device": environment.get("device"),
        "commit": environment.get("commit"),
        **{f"version_{name}": v for name, v in environment.get("versions", {}).items()},
    }
    write_rows([{**row, **about} for row in results.table()], output / CSV_NAME)


def load(folder: Path) -> Results:
    """Read what ``save_data`` wrote.

    Raises:
        BenchError: there is none, or it is something else.
    """
    path = folder / JSON_NAME
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        raise BenchError(f"{path} is no result of the kernel benchmark: {error}") from error


def show(results: Results, output: Path) -> None:
    """Draw the plot into ``output`` and print the tables."""
    from rich.console import Console

    from vllm_sparsek.serving_bench.kernel_bench.report import roofline, table

    write_atomically(output / PLOT_NAME, roofline.render(results))
    table.show(results, Console())
