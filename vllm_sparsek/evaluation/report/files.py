"""The JSON with everything, and a CSV with one row per measure, task and cell."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vllm_sparsek.evaluation.results import Results
from vllm_sparsek.serving_bench.writing import write_atomically, write_rows

JSON_NAME = "results.json"
CSV_NAME = "results.csv"


def write(results: Results, output: Path) -> None:
    """Write both files."""
    content = json.dumps(results.to_json(), indent=1) + "\n"
    write_atomically(output / JSON_NAME, content.encode())
    about = {
        "model": results.model,
        "device": results.environment.get("device"),
        "commit": results.environment.get("commit"),
    }
    write_rows([{**asdict(row), **about} for row in results.rows], output / CSV_NAME)
