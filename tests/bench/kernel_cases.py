"""Small cases and rows for the kernel benchmark's tests, and a clock for machines without a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.measure import Timing
from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row, new_row

CPU = torch.device("cpu")
TOKENS = Budget(k=24, window=16, sinks=4, refresh=32)
PAGES = Budget(k=32, window=24, sinks=3, refresh=32, unit=16)
DECODE = Case(
    "tiny", "decode", "decode", batch=2, context=200, queries=1, query_heads=4, kv_heads=2,
    head_dim=64, dtype="float16", page=16, budgets=(TOKENS, PAGES), against="fa3",
)  # fmt: skip
PREFILL = replace(
    DECODE, group="tiers", kind="prefill", queries=200, against="sdpa", local_window=40
)
CHUNK = replace(PREFILL, queries=90, against="fa3")
FP8_DECODE, FP8_CHUNK = (replace(case, cache="float8_e4m3fn") for case in (DECODE, CHUNK))
SELECT = replace(DECODE, group="select", kind="select", against="torch-topk")
SCORE = replace(DECODE, group="score", kind="score", queries=7, against="vllm-kv-write")
TRAINING = replace(
    DECODE, group="micro", kind="training", against=None, budgets=(Budget(8, 1, 0, 1),)
)
CASES = (DECODE, PREFILL, CHUNK, SELECT, SCORE, TRAINING)
IDS = ("decode", "prefill", "chunk", "select", "score", "training")


def call_once(calls, capturable=True):
    """Makes the calls and pretends that each takes a microsecond."""
    for call in calls:
        call()
    return Timing(1.0, 1.0, 1.0, len(calls), "none")


def row(arm: str, case: Case = PREFILL, budget: Budget | None = None, **fields: object) -> Row:
    """A fabricated row of a case, 100 us and green unless said otherwise."""
    made = new_row(0, case, budget, arm, "attention")
    given = {"us": 100.0, "us_p20": 99.0, "us_p80": 101.0, "samples": 21, "timing": "graph",
             "bytes": 10**8, "flops": 1e10, "density": 1.0, "gate": True, "max_diff": 1e-4,
             "error_share": 0.5} | fields  # fmt: skip
    return made.model_copy(update=given)


def results(*rows: Row, **fields: object) -> Results:
    """A fabricated run on a device that copies 4000 GB/s."""
    given = {
        "command": ["vllm-sparsek", "bench", "kernels"],
        "started_utc": "2026-01-01T00:00:00Z",
        "environment": {"device": "Fabricated", "commit": "abc", "versions": {"torch": "2"}},
        "ceilings": {"copy_gb_per_s": 4000.0, "matmul_tflops": 600.0},
        "rows": list(rows),
    } | fields
    return Results(**given)
