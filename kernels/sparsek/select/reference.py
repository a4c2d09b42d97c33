"""Specification of select: which units each (item, KV head) keeps. Plain torch, for reading.

An *item* is a group of queries that share one selection: one decode row, or the queries of
one prefill chunk that fall into one refresh block.
"""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.projection import sparsek_gates


def unit_scores(token_scores: torch.Tensor, unit: int, pooling: str) -> torch.Tensor:
    """Scores of whole units: [H, n] -> [H, n // unit]; ``pooling`` is lse, max or mean."""
    if unit == 1:
        return token_scores
    whole = token_scores.shape[-1] // unit * unit
    pages = token_scores[..., :whole].unflatten(-1, (-1, unit))
    if pooling == "lse":
        return pages.logsumexp(-1)
    return pages.amax(-1) if pooling == "max" else pages.mean(-1)


def select(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    pooling: str = "lse",
    soft: bool = False,
    max_units: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Units kept by every item and KV head.

    Args:
        scores: [num_blocks, H, page] token scores in the paged score cache.
        block_table: [rows, max_blocks] int32, physical block of every logical block.
        item_row: [items] int32, row of the block table; negative: an empty (padding) item.
        item_position: [items] int32, query position; its selection position follows from it.
        budget: the budget.
        pooling: how token scores become page scores (lse, max, mean).
        soft: also return the value weights of mode ``soft_v``.
        max_units: width of the result; default: the most any item keeps.

    Returns:
        units: [items, H, K] int32, ascending unit indices, padded with -1.
        gates: [items, H, K] float32, clip(u - tau, 0, 1) of every kept unit (0 in the
            padding), or None when ``soft`` is false. While everything fits, all gates are 1.
    """
    page, heads = scores.shape[2], scores.shape[1]
    if max_units is None:
        longest = int(item_position.max().item()) if item_position.numel() else 0
        max_units = budget.units_kept(budget.selection_position(max(longest, 0)))
    units = torch.full((item_row.numel(), heads, max_units), -1, dtype=torch.int32)
    gates = torch.zeros(units.shape, dtype=torch.float32) if soft else None
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        start = budget.selection_position(position)
        first, end = budget.first_unit(), budget.end_unit(start)
        if end <= first:
            continue
        blocks = block_table[row, : -(-end * budget.unit // page)].long()
        tokens = scores[blocks].transpose(0, 1).flatten(1)  # [H, n]
        scored = unit_scores(tokens, budget.unit, pooling)[:, first:end]
        for part, own in budget.by_heads(heads):
            z, keep = scored[part], min(own.units_kept(start), end - first)
            # stable sort: of equal scores the earlier unit stays
            best = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :keep]
            order = best.sort(-1).values
            units[item, part, :keep] = (order + first).int()
            if gates is not None:
                # scores of -inf are kept only where there is room for all that have one
                gate = sparsek_gates(z, keep).masked_fill(z == float("-inf"), 1.0)
                gates[item, part, :keep] = gate.gather(1, order).float()
    return units, gates
