"""Bounds: keep the range of every unit's keys, and choose units by the query."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor, implementation
from vllm_sparsek.kernels.common.validate import FLOATS, FP8


def write_bounds(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    bounds: torch.Tensor,
    impl: str = "auto",
) -> None:
    """Store the bounds of the units that the new tokens complete.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; the new tokens' keys are already in it.
        slot_mapping: [T] int64, physical slot of every new token; -1 is padding.
        bounds: [num_blocks, H, page // unit, 2, D] of the same dtype, written in place:
            minimum and maximum over the unit's tokens, of an fp8 cache before its scale.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = kv_cache.device
    check_tensor("kv_cache", kv_cache, 4, (*FLOATS, FP8), device)
    check_tensor("slot_mapping", slot_mapping, 1, torch.int64, device)
    check_tensor("bounds", bounds, 5, kv_cache.dtype, device)
    num_blocks, heads, page, width = kv_cache.shape
    check_shape("bounds", bounds, (num_blocks, heads, bounds.shape[2], 2, width // 2))
    if page % bounds.shape[2]:
        raise ValueError(f"bounds of {bounds.shape[2]} units do not divide pages of {page} tokens")
    implementation("bounds", impl, device).write_bounds(kv_cache, slot_mapping, bounds)


def select_by_query(
    query: torch.Tensor,
    bounds: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    units_out: torch.Tensor,
    unit_scores: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Exact top-k of the units whose keys could match an item's query best.

    Args:
        query: [items, Hq, D], one query an item.
        bounds: [num_blocks, H, page // unit, 2, D] of the same dtype or float8_e4m3fn, see
            ``write_bounds``. The scale of an fp8 cache is a positive factor of all of them: it
            changes no choice.
        block_table: [rows, max_blocks] int32, physical block of every logical block.
        item_row: [items] int32, row of the block table; negative: an empty (padding) item.
        item_position: [items] int32, query position. Sinks, window and the number of places
            follow from the start of its refresh block.
        budget: the budget; its unit is that of the bounds.
        units_out: [items, H, K] int32, contiguous; written: ascending unit indices, padded
            with -1. K is at least what any item keeps (``budget.max_units``).
        unit_scores: [items, H, U] float32 scratch, contents irrelevant; U is at least the
            units of the longest context and sizes the grid. Without it the call allocates for
            what the block table can address, which CUDA graphs may not want.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = query.device
    check_tensor("query", query, 3, FLOATS, device)
    check_tensor("bounds", bounds, 5, (query.dtype, FP8), device)
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("item_row", item_row, 1, torch.int32, device)
    check_tensor("item_position", item_position, 1, torch.int32, device)
    check_tensor("units_out", units_out, 3, torch.int32, device)
    num_blocks, heads, per_block = bounds.shape[:3]
    items, query_heads, head_dim = query.shape
    check_shape("bounds", bounds, (num_blocks, heads, per_block, 2, head_dim))
    check_shape("item_row", item_row, (items,))
    check_shape("item_position", item_position, (items,))
    check_shape("units_out", units_out, (items, heads, units_out.shape[2]))
    if budget.heads:
        raise ValueError("budget.heads: selection by the query keeps equally much in all KV heads")
    if query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, not a multiple of the {heads} KV heads")
    module = implementation("bounds", impl, device)
    arguments = (query, bounds, block_table, item_row, item_position, budget)
    if module.__name__.endswith("reference"):
        units_out.copy_(module.select_by_query(*arguments, units_out.shape[2]))
        return
    if not module.__name__.endswith("triton"):
        module.select_by_query(*arguments, units_out)
        return
    if unit_scores is None:
        shape = (items, heads, block_table.shape[1] * per_block)
        unit_scores = torch.empty(shape, dtype=torch.float32, device=device)
    check_tensor("unit_scores", unit_scores, 3, torch.float32, device)
    check_shape("unit_scores", unit_scores, (items, heads, unit_scores.shape[2]))
    module.select_by_query(*arguments, units_out, unit_scores)
