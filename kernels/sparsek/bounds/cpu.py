"""Bounds on the CPU, vectorised torch. Same meaning as the reference."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.kernels.select.cpu import top_units


def write_bounds(kv_cache: torch.Tensor, slot_mapping: torch.Tensor, bounds: torch.Tensor) -> None:
    """See ``reference.write_bounds``."""
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    unit = page // bounds.shape[2]
    slots = slot_mapping[(slot_mapping >= 0) & (slot_mapping % unit == unit - 1)]
    if slots.numel() == 0:
        return
    block, inside = slots // page, slots % page // unit
    key = kv_cache.unflatten(2, (-1, unit))[block, :, inside, :, :head_dim]  # [n, H, unit, D]
    if key.dtype == FP8:
        key = key.float()
    bounds[block, :, inside] = torch.stack(key.aminmax(dim=2), dim=2).to(bounds.dtype)


def select_by_query(
    query: torch.Tensor,
    bounds: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    units_out: torch.Tensor,
) -> None:
    """See ``reference.select_by_query``; the result goes to ``units_out``.

    q . bound, channel by channel the larger one, is one matrix product: the negative part of
    the query with the minima and its positive part with the maxima.
    """
    heads, per_block, _, head_dim = bounds.shape[1:]
    units_out.fill_(-1)
    q = query.float().view(-1, heads, query.shape[1] // heads, head_dim)
    parts = torch.cat([q.clamp(max=0), q.clamp(min=0)], dim=-1).transpose(2, 3)  # [I, H, 2D, G]
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
        if keep == end - first:
            units_out[item, :, :keep] = torch.arange(first, end)
            continue
        blocks = block_table[row, : -(-end // per_block)].long()
        found = bounds.index_select(0, blocks).float().transpose(0, 1)  # [H, blocks, units, 2, D]
        z = (found.flatten(3).flatten(1, 2) @ parts[item]).amax(-1)[:, first:end]
        units_out[item, :, :keep] = top_units(z, keep) + first
