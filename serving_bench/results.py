"""The record of a benchmark: one `Run` per (arm, workload, repeat), and medians over repeats."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vllm_sparsek.serving_bench.config import Arm

# bump when a field of the JSON changes its meaning
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Run:
    """One run. Metrics: tokens/s, milliseconds, shares of 1; None is "not available"."""

    arm: str
    workload: str
    scale: str
    repeat: int
    seed: int
    started_utc: str
    duration_s: float
    completed: int
    failed: int
    metrics: dict[str, float | None]
    client_command: list[str]
    server_command: list[str] | None
    vllm_result: dict[str, Any]


@dataclass
class Results:
    """Everything one invocation measured.

    quality_window: the text that quality was measured on, None if it was not asked for.
    perplexity: of that window, by arm.
    """

    command: list[str]
    model: str
    started_utc: str
    environment: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    workloads: dict[str, dict[str, Any]]
    runs: list[Run] = field(default_factory=list)
    startup_s: dict[str, float] = field(default_factory=dict)
    quality_window: dict[str, Any] | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values: everything, and the summary."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "summary": self.summary()}

    def quality(self, arm: str) -> dict[str, float | None]:
        """Return an arm's perplexity, and its change against the first dense arm as a share of 1.

        Nothing if no arm's quality was asked for; None is "not available".
        """
        if self.quality_window is None:
            return {}
        dense = next((name for name, settings in self.arms.items() if Arm(**settings).dense), arm)
        own, reference = self.perplexity.get(arm), self.perplexity.get(dense)
        change = own / reference - 1 if own and reference and arm != dense else None
        return {"perplexity": own, "perplexity_change": change}

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per (arm, workload) in the order measured: medians over the repeats."""
        groups: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.arm, run.workload), []).append(run)
        rows = []
        for (arm, workload), runs in groups.items():
            row: dict[str, Any] = {
                "arm": arm,
                "workload": workload,
                "repeats": len(runs),
                "failed": sum(run.failed for run in runs),
            }
            for name in runs[0].metrics:
                values = [v for run in runs if (v := run.metrics.get(name)) is not None]
                row[name] = median(values) if values else None
            row |= self.quality(arm)
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Column:
    """One column of the tables: metric name, heading, unit, decimals, factor to that unit."""

    name: str
    heading: str
    unit: str
    decimals: int
    factor: float = 1.0

    def show(self, row: dict[str, Any]) -> str:
        """Format the value of a summary row; `n/a` if it is not available."""
        value = row.get(self.name)
        return "n/a" if value is None else f"{value * self.factor:,.{self.decimals}f}"


class PerplexityColumn(Column):
    """Perplexity, and in brackets its change against the dense arm."""

    def show(self, row: dict[str, Any]) -> str:
        """Format the value of a summary row; `n/a` if it is not available."""
        change = row.get("perplexity_change")
        return super().show(row) + ("" if change is None else f" ({100 * change:+.1f} %)")


# the three figures a benchmark is asked for come first
COLUMNS = (
    Column("prompt_tokens_per_s", "prompt", "tok/s", 1),
    Column("generation_tokens_per_s", "gen.", "tok/s", 1),
    Column("kv_hit_rate", "KV hit", "%", 1, 100.0),
    Column("density", "density", "", 2),
    Column("decode_density", "density, decode", "", 2),
    Column("prefill_tokens_per_s", "prefill", "tok/s", 1),
    Column("ttft_p50", "TTFT p50", "ms", 0),
    Column("ttft_p99", "TTFT p99", "ms", 0),
    Column("tpot_p50", "TPOT p50", "ms", 1),
    Column("itl_p50", "ITL p50", "ms", 1),
    Column("itl_p99", "ITL p99", "ms", 1),
    Column("kv_usage_peak", "KV peak", "%", 1, 100.0),
    Column("preemptions", "preempt.", "", 0),
)
PERPLEXITY = PerplexityColumn("perplexity", "perplexity", "", 2)


def columns(results: Results) -> tuple[Column, ...]:
    """Return the columns of a benchmark's tables: quality stands where it was asked for."""
    return COLUMNS if results.quality_window is None else (PERPLEXITY, *COLUMNS)
