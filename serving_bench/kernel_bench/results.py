"""The record of a run: one `Row` per (case, budget, arm)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench.cases import Case, Tier, budget_label
from vllm_sparsek.serving_bench.kernel_bench.work import Work

# bump when a field of the JSON changes its meaning
SCHEMA_VERSION = 1

Status = Literal["ok", "failed", "unavailable"]


class Row(BaseModel):
    """What one arm did with one case.

    Attributes:
        case_id: number of the case in its run; speed-ups are taken within it.
        case_set, group, kind, case: which case.
        batch .. page: its shape; cache: dtype of a quantised cache.
        budget: label, k .. unit in tokens; None for a dense arm.
        against: arm of the case that speed-ups refer to.
        arm, part: who, and what of the work it does.
        status, reason: failed and unavailable say why.
        us, us_p20, us_p80, samples, timing: microseconds of a call, and how they were taken.
        note: settings chosen for the case.
        bytes, flops: what a call must move and multiply at least.
        density: kept / causal pairs of (query, token).
        gate: whether the result is right; None: not looked at here.
        max_diff: of the sampled outputs against float64; error_share: of what is allowed;
            user_bound: the largest difference the project's user allows.
    """

    model_config = ConfigDict(extra="ignore")

    case_id: int
    case_set: str
    group: str
    kind: str
    case: str
    batch: int
    context: int
    queries: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    page: int
    cache: str | None = None
    budget: str | None = None
    k: int | None = None
    window: int | None = None
    sinks: int | None = None
    refresh: int | None = None
    unit: int | None = None
    against: str | None = None
    arm: str
    part: str
    status: Status = "ok"
    reason: str = ""
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    samples: int | None = None
    timing: str = ""
    note: str = ""
    bytes: int | None = None
    flops: float | None = None
    density: float | None = None
    gate: bool | None = None
    max_diff: float | None = None
    error_share: float | None = None
    user_bound: float | None = None

    @property
    def us_per_head(self) -> float | None:
        """Microseconds per (batch x query head)."""
        return None if self.us is None else self.us / (self.batch * self.query_heads)

    @property
    def gb_per_s(self) -> float | None:
        """Gigabytes per second of the bytes it must move."""
        return None if self.us is None or not self.bytes else self.bytes / self.us / 1e3

    @property
    def tflops(self) -> float | None:
        """Useful teraflops per second."""
        return None if self.us is None or not self.flops else self.flops / self.us / 1e6


def new_row(case_id: int, case: Case, budget: Budget | None, arm: str, part: str) -> Row:
    """A row that says what is to be run."""
    fields: dict[str, Any] = {
        name: getattr(case, name)
        for name in (
            "case_set", "group", "kind", "batch", "context", "queries", "query_heads", "kv_heads",
            "head_dim", "dtype", "page", "cache", "against",
        )
    }  # fmt: skip
    if budget is not None:
        fields |= {name: getattr(budget, name) for name in ("k", "window", "sinks", "refresh")}
        fields |= {"unit": budget.unit, "budget": budget_label(budget)}
    return Row(case_id=case_id, case=case.name, arm=arm, part=part, **fields)


def with_work(row: Row, work: Work) -> None:
    """Note what a call must do."""
    row.bytes, row.flops, row.density = work.bytes, work.flops or None, work.density


class Results(BaseModel):
    """Everything one invocation measured.

    ceilings: measured in the same run, copy_gb_per_s and matmul_tflops; tiers: those of its sets.
    """

    schema_version: int = SCHEMA_VERSION
    command: list[str]
    started_utc: str
    environment: dict[str, Any]
    ceilings: dict[str, float] = {}
    tiers: dict[str, Tier] = {}
    rows: list[Row] = []
    error: str | None = None

    def reference(self, row: Row) -> Row | None:
        """The dense row that ``row`` is compared with; None where that says nothing."""
        for other in self.rows:
            if (other.case_id, other.arm) != (row.case_id, row.against) or other is row:
                continue
            # of several budgets, the one of the same
            if other.budget in (None, row.budget) and other.part in row.part.split("+"):
                return other
        return None

    def speedup(self, row: Row) -> float | None:
        """How many times faster than its reference; None unless both gates are green."""
        other = self.reference(row)
        if other is None or not (row.gate and other.gate) or not row.us or not other.us:
            return None
        return other.us / row.us

    def copy_share(self, row: Row) -> float | None:
        """Bandwidth as a share of the device's copy."""
        ceiling = self.ceilings.get("copy_gb_per_s")
        return None if row.gb_per_s is None or not ceiling else row.gb_per_s / ceiling

    def table(self) -> list[dict[str, Any]]:
        """Rows with what follows from them, for JSON and CSV."""
        return [
            {
                **row.model_dump(),
                "us_per_head": row.us_per_head,
                "gb_per_s": row.gb_per_s,
                "copy_share": self.copy_share(row),
                "tflops": row.tflops,
                "speedup": self.speedup(row),
            }
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values: everything, and what follows from the rows."""
        return {**self.model_dump(), "rows": self.table()}
