"""What a case asks of the hardware at least: bytes, multiplications, the share of pairs kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_sparsek.kernels.common.budget import Budget, mean_tokens_attended
from vllm_sparsek.serving_bench.kernel_bench.cases import Case

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
SCORE_BYTES = INDEX_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Of one call: bytes that must move, useful floating-point operations, kept / causal pairs."""

    bytes: int
    flops: float = 0.0
    density: float | None = None

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        density = self.density if other.density is None else other.density
        return Work(self.bytes + other.bytes, self.flops + other.flops, density)


def cache_item_bytes(case: Case) -> int:
    """Of a number of the K/V cache."""
    return ITEM_BYTES[case.cache or case.dtype]


def query_positions(case: Case) -> np.ndarray:
    """[queries] int64: positions of one request's queries."""
    return np.arange(case.context - case.queries, case.context)


def item_positions(case: Case, refresh: int) -> np.ndarray:
    """[items] int64: first query of every refresh block that one request's queries touch."""
    positions = query_positions(case)
    starts = np.unique(positions // refresh * refresh)
    return np.maximum(starts, positions[0])


def tokens_read(case: Case, budget: Budget | None, local_window: int | None = None) -> np.ndarray:
    """[queries]: tokens that each query of a request reads, per KV head."""
    positions = query_positions(case)
    if budget is not None:
        return mean_tokens_attended([budget], positions)
    if local_window is not None:
        return np.minimum(positions + 1, local_window)
    return positions + 1


def density(case: Case, budget: Budget | None, local_window: int | None = None) -> float:
    """Kept pairs of (query, token) as a share of the causal pairs."""
    causal = (query_positions(case) + 1).sum()
    return float(tokens_read(case, budget, local_window).sum() / causal)


def _units_listed(case: Case, budget: Budget) -> int:
    """Entries of all selection lists of one call."""
    kept = 0
    for position in item_positions(case, budget.refresh).tolist():
        start = budget.selection_position(position)
        competing = budget.units_competing(start)
        kept += min(budget.units_kept(start), competing)
    return kept * case.batch * case.kv_heads


def attention(case: Case, budget: Budget | None, local_window: int | None = None) -> Work:
    """Attention over what is kept; None: over everything. The list is read too."""
    read = tokens_read(case, budget, local_window)
    pairs = float(read.sum()) * case.batch * case.query_heads
    rows = 2 * case.batch * case.queries * case.query_heads * case.head_dim
    rows *= ITEM_BYTES[case.dtype]
    # queries side by side share what they read: of a prompt, every key and value once
    tokens = float(read.max()) if case.queries == 1 else case.context
    rows += round(tokens * case.batch * case.kv_heads * 2 * case.head_dim * cache_item_bytes(case))
    if budget is not None:
        rows += _units_listed(case, budget) * INDEX_BYTES
    return Work(rows, 4.0 * case.head_dim * pairs, density(case, budget, local_window))


def selection(case: Case, budget: Budget) -> Work:
    """Scores that compete are read once, lists are written."""
    start = budget.selection_position(case.context - 1)
    competing = budget.units_competing(start) * budget.unit
    scores = competing * case.batch * case.kv_heads * SCORE_BYTES
    return Work(scores + _units_listed(case, budget) * INDEX_BYTES)


def kv_write(case: Case) -> Work:
    """Keys and values of the new tokens, read and written."""
    tokens = case.batch * case.queries
    return Work(4 * tokens * case.kv_heads * case.head_dim * ITEM_BYTES[case.dtype])


def score_write(case: Case) -> Work:
    """Scores of the new tokens, read and written."""
    return Work(2 * case.batch * case.queries * case.kv_heads * SCORE_BYTES)
