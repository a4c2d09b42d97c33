"""Specification of query-aware selection by bounds of keys. Plain torch, for reading.

Quest (Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
arXiv 2406.10774) keeps the smallest and the largest value of every channel of a page's keys.
No key of the page can have a larger product with a query than the bounds allow, and pages are
chosen by that upper bound. Here a *unit* of ``budget.unit`` tokens takes the place of the page,
so that large KV blocks do not make the bounds loose; a KV block holds whole units.
"""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget


def write_bounds(kv_cache: torch.Tensor, slot_mapping: torch.Tensor, bounds: torch.Tensor) -> None:
    """Bounds of the units that the new tokens complete.

    Only complete units are ever chosen, so a unit's bounds are written once, when its last
    token is: a function of the unit's tokens, however they arrived.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; the new tokens' keys are already in it.
        slot_mapping: [T] int64, physical slot of every new token; -1 is padding.
        bounds: [num_blocks, H, page // unit, 2, D] of the same dtype, written in place:
            minimum and maximum over the unit's tokens.
    """
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    unit = page // bounds.shape[2]
    for slot in slot_mapping.tolist():
        if slot < 0 or slot % unit != unit - 1:
            continue
        block, last = slot // page, slot % page
        key = kv_cache[block, :, last + 1 - unit : last + 1, :head_dim]  # [H, unit, D]
        # fp8 has no order of its own in torch; a double holds every key
        bounds[block, :, last // unit, 0] = key.double().amin(1).to(bounds.dtype)
        bounds[block, :, last // unit, 1] = key.double().amax(1).to(bounds.dtype)


def upper_bounds(query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How large the product of a query with any key of a unit can be, at most.

    Args:
        query: [Hq, D]; bounds: [n, H, 2, D] of n units.

    Returns:
        [H, n] float64: the highest bound of the query heads that share a KV head.
    """
    heads, head_dim = bounds.shape[1], bounds.shape[3]
    q = query.double().view(heads, -1, 1, head_dim)  # [H, G, 1, D]
    low, high = bounds.double().permute(2, 1, 0, 3).unsqueeze(2)  # [H, 1, n, D]
    return torch.maximum(q * low, q * high).sum(-1).amax(1)


def select_by_query(
    query: torch.Tensor,
    bounds: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    max_units: int,
) -> torch.Tensor:
    """Units kept by every item and KV head: those of the highest upper bounds.

    Args:
        query: [items, Hq, D], one query an item.
        bounds: [num_blocks, H, page // unit, 2, D].
        block_table: [rows, max_blocks] int32, physical block of every logical block.
        item_row: [items] int32, row of the block table; negative: an empty (padding) item.
        item_position: [items] int32, query position. Sinks, window and the number of places
            follow from the start of its refresh block; the choice is the query's own.
        budget: the budget.
        max_units: width of the result.

    Returns:
        [items, H, K] int32, ascending unit indices, padded with -1; of equals the earlier.
    """
    heads, per_block = bounds.shape[1:3]
    units = torch.full((item_row.numel(), heads, max_units), -1, dtype=torch.int32)
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        start = budget.selection_position(position)
        first, end = budget.first_unit(), budget.end_unit(start)
        if end <= first:
            continue
        keep = min(budget.units_kept(start), end - first)
        u = torch.arange(first, end)
        z = upper_bounds(query[item], bounds[block_table[row, u // per_block].long(), :,
                                             u % per_block])  # fmt: skip
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :keep]
        units[item, :, :keep] = (order.sort(-1).values + first).int()
    return units
