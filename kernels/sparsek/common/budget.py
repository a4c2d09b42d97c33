"""What a query may read: the budget and the few integer rules that follow from it.

The rules are those of SparseK attention (Lou, Jia, Zheng, Tu, arXiv 2406.16747) made
independent of how a prompt was cut into chunks: everything below is a function of the
absolute query position alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Budget:
    """How much of the context one query reads.

    Units: a *unit* is what competes for a place: one token (``unit == 1``) or one page of
    ``unit`` tokens. Sinks and window never compete; at page granularity they are rounded
    outwards to whole pages.

    Attributes:
        k: tokens kept outside sinks and window, or the least number of them when
            ``k_share`` is set.
        k_share: if not None, the share of the context (0 < share < 1) that is kept; ``k``
            is then its floor.
        window: tokens of the sliding window, at least 1.
        sinks: tokens at the start that are always read.
        refresh: R, the number of query positions that share one selection.
        unit: tokens per competing unit.
        heads: ``(k, k_share)`` of every KV head where they differ, else empty; see
            ``with_heads``. ``k`` and ``k_share`` are then the largest of them, and every rule
            below speaks of the head that keeps most.
    """

    k: int
    window: int
    sinks: int
    refresh: int
    unit: int = 1
    k_share: float | None = None
    heads: tuple[tuple[int, float | None], ...] = ()

    def with_heads(self, heads: Sequence[tuple[int, float | None]]) -> Budget:
        """The same budget with ``(k, k_share)`` of its own for every KV head."""
        shares = [share for _, share in heads if share is not None]
        return replace(
            self,
            k=max(k for k, _ in heads),
            k_share=max(shares, default=None),
            heads=tuple(heads) if len(set(heads)) > 1 else (),
        )

    def of_heads(self, part: slice) -> Budget:
        """The budget of some of the KV heads, as if there were no others."""
        return self.with_heads(self.heads[part]) if self.heads else self

    def by_heads(self, count: int) -> list[tuple[slice, Budget]]:
        """``count`` KV heads as slices whose heads keep equally much, each with its budget."""
        if not self.heads:
            return [(slice(0, count), self)]
        parts = [slice(head, head + 1) for head in range(count)]
        return [(part, self.of_heads(part)) for part in parts]

    def tokens_kept(self, position: int) -> int:
        """Tokens outside sinks and window that the selection made at ``position`` keeps."""
        if self.k_share is None:
            return self.k
        return max(self.k, math.ceil(self.k_share * (position + 1)))

    def units_kept(self, position: int) -> int:
        """Units outside sinks and window that the selection made at ``position`` keeps."""
        return -(-self.tokens_kept(position) // self.unit)

    def selection_position(self, position: int) -> int:
        """The position whose selection the query at ``position`` uses (start of its block)."""
        return position // self.refresh * self.refresh

    def first_unit(self) -> int:
        """First unit that competes: the sinks, rounded up to whole units, come before it."""
        return -(-self.sinks // self.unit)

    def end_unit(self, selection_position: int) -> int:
        """One past the last unit that competes: units from here on touch the window."""
        return max(self.first_unit(), (selection_position - self.window + 1) // self.unit)

    def units_competing(self, selection_position: int) -> int:
        """Units that compete for a place in the selection made there."""
        return self.end_unit(selection_position) - self.first_unit()

    def is_dense(self, position: int) -> bool:
        """Whether the query at ``position`` reads its whole context."""
        start = self.selection_position(position)
        return start + 1 <= self.sinks + self.window + self.tokens_kept(start)

    def first_sparse_position(self, limit: int) -> int:
        """Smallest position that is not dense, or ``limit`` if there is none below it.

        ``is_dense`` never becomes true again once it was false (the kept share is below
        one), so every later position is sparse.
        """
        low, high = 0, -(-limit // self.refresh)
        while low < high:
            middle = (low + high) // 2
            if self.is_dense(middle * self.refresh):
                low = middle + 1
            else:
                high = middle
        return min(limit, low * self.refresh)

    def tokens_attended(self, position: int) -> int:
        """Tokens the query at ``position`` reads, per KV head."""
        if self.is_dense(position):
            return position + 1
        start = self.selection_position(position)
        first, end = self.first_unit(), self.end_unit(start)
        kept = min(self.units_kept(start), end - first)
        return min(position + 1, (first + kept - end) * self.unit + position + 1)

    def max_units(self, max_model_len: int) -> int:
        """Largest number of units any selection keeps for contexts up to ``max_model_len``."""
        return self.units_kept(max_model_len - 1)

    def max_tokens_attended(self, max_model_len: int) -> int:
        """Upper bound of tokens one sparse query reads, for sizing scratch and grids."""
        window = self.window + self.refresh - 1 + self.unit
        return (self.first_unit() + self.max_units(max_model_len)) * self.unit + window


def mean_tokens_attended(budgets: Sequence[Budget], positions: np.ndarray) -> np.ndarray:
    """``tokens_attended`` of many queries, averaged over layers and their KV heads.

    Args:
        budgets: the layers' budgets, which differ in ``k``, ``k_share`` and ``heads`` alone.
        positions: [n] int64, positions of queries that select.

    Returns:
        [n] float64.
    """
    b = budgets[0]
    # what a query leaves out depends on its refresh block alone
    start, block = np.unique(positions // b.refresh * b.refresh, return_inverse=True)
    layers = [budget.heads or ((budget.k, budget.k_share),) for budget in budgets]
    k = np.array([[k] for heads in layers for k, _ in heads])
    share = np.array([[share or 0.0] for heads in layers for _, share in heads])
    weight = np.array([1 / len(heads) for heads in layers for _ in heads])
    kept_tokens = np.maximum(k, np.ceil(share * (start + 1))).astype(np.int64)  # [heads, blocks]
    first = b.first_unit()
    competing = np.maximum(first, (start - b.window + 1) // b.unit) - first
    left_out = competing - np.minimum(-(-kept_tokens // b.unit), competing)
    return positions + 1 - np.average(left_out, axis=0, weights=weight)[block] * b.unit
