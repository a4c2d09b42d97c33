"""The user's tiers: the fastest sparse result that is dense enough, against what it must beat."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sparsek.serving_bench.kernel_bench.cases import Tier
from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row

GROUP = "tiers"
ARM = "sparsek"  # selection included


@dataclass(frozen=True)
class Outcome:
    """One tier's result. row: the fastest that counts; why: what is missing or how far it is."""

    name: str
    tier: Tier
    row: Row | None
    speedup: float | None
    passed: bool
    why: str


def _fault(results: Results, tier: Tier, row: Row, cost: float) -> str:
    """What keeps ``row`` from passing, "" if nothing does; ``cost``: its us per (batch x head)."""
    reached = cost <= tier.us_per_head if tier.inclusive else cost < tier.us_per_head
    if not reached:
        return f"{cost / tier.us_per_head:.2f}x the target"
    speedup = results.speedup(row)
    if speedup is None:
        return f"no speed-up over {row.against}: it was not measured, or its gate is not green"
    if speedup < tier.speedup:
        return f"{speedup:.2f}x over {row.against}, {tier.speedup:.2f}x asked for"
    for name in tier.beats:
        rival = next((r for r in results.rows if (r.case_id, r.arm) == (row.case_id, name)), None)
        if rival is None or rival.us is None:
            return f"{name} was not measured" + (f": {rival.reason}" if rival else "")
        if not rival.gate:
            return f"the gate of {name} is not green"
        if row.us is None or row.us >= rival.us:
            return f"not faster than {name}"
    return ""


def judge(results: Results) -> list[Outcome]:
    """Judge every tier of the run."""
    found = []
    for name, tier in results.tiers.items():
        timed = [
            (row.us_per_head, row)
            for row in results.rows
            if row.group == GROUP and row.arm == ARM and row.us_per_head is not None
        ]
        dense_enough = [(cost, row) for cost, row in timed if (row.density or 0.0) >= tier.density]
        right = [(cost, row) for cost, row in dense_enough if row.gate]
        if not right:
            why = (
                "no result" if not timed
                else f"no density of {tier.density} or more" if not dense_enough
                else "no gate is green"
            )  # fmt: skip
            found.append(Outcome(name, tier, None, None, False, why))
            continue
        cost, row = min(right, key=lambda pair: pair[0])
        fault = _fault(results, tier, row, cost)
        found.append(Outcome(name, tier, row, results.speedup(row), not fault, fault))
    return found
