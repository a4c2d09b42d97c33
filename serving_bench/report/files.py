"""The JSON with everything, and a CSV with one row per run."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_sparsek.serving_bench.results import Results, Run
from vllm_sparsek.serving_bench.writing import write_atomically, write_rows

# in front of the metrics; the metrics follow in the order in which a run has them
_RUN_FIELDS = (
    "arm", "workload", "scale", "repeat", "seed", "started_utc", "duration_s", "completed", "failed"
)  # fmt: skip


def write_json(results: Results, path: Path) -> None:
    """Write everything as JSON."""
    write_atomically(path, (json.dumps(results.to_json(), indent=2) + "\n").encode())


def _row(results: Results, run: Run) -> dict[str, object]:
    environment = results.environment
    versions = environment.get("versions", {})
    return {
        **{name: getattr(run, name) for name in _RUN_FIELDS},
        **run.metrics,
        **results.quality(run.arm),
        "model": results.model,
        "device": environment.get("device"),
        "commit": environment.get("commit"),
        **{f"version_{name}": version for name, version in versions.items()},
    }


def write_csv(results: Results, path: Path) -> None:
    """Write one row per run: tokens/s, ms, shares of 1; empty where not available."""
    write_rows([_row(results, run) for run in results.runs], path, _RUN_FIELDS)
