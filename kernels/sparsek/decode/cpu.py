"""Sparse decode on the CPU: gather what is kept, then torch's attention kernel.

In parts, so that a caller that decodes step by step can keep ``kept_rows`` while the selection
stands (it changes every R positions) and ``window_rows`` for all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.gather import kv_rows


def _rows(kv_cache: torch.Tensor, blocks: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rows of ``kv_rows`` for positions [H, m] of one request, one KV head a line."""
    heads, page, width = kv_cache.shape[1:]
    step = kv_cache.stride(0) // width
    index = blocks[position // page].long() * step + position % page
    return index + torch.arange(heads)[:, None] * page


def kept_rows(
    kv_cache: torch.Tensor, blocks: torch.Tensor, units: torch.Tensor, position: int, budget: Budget
) -> torch.Tensor:
    """Cache rows of the sinks and the kept units.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; blocks: [max_blocks] int32.
        units: [H, K] kept units padded with -1.
        position: query position; budget: the budget.

    Returns:
        [H, sinks + kept] int64 rows of ``kv_rows(kv_cache)``.
    """
    heads = units.shape[0]
    first = budget.first_unit()
    start = budget.selection_position(position)
    kept = max(0, min(budget.units_kept(start), budget.end_unit(start) - first))
    chosen = units[:, :kept].long()
    if budget.unit > 1:
        chosen = (chosen[..., None] * budget.unit + torch.arange(budget.unit)).flatten(1)
    sinks = torch.arange(min(first * budget.unit, position + 1)).expand(heads, -1)
    return _rows(kv_cache, blocks, torch.cat([sinks, chosen], dim=1))


def window_rows(
    kv_cache: torch.Tensor, blocks: torch.Tensor, position: int, budget: Budget
) -> torch.Tensor:
    """Cache rows of the window, [H, window] int64; see ``kept_rows``."""
    end = budget.end_unit(budget.selection_position(position)) * budget.unit
    window = torch.arange(min(end, position + 1), position + 1)
    return _rows(kv_cache, blocks, window.expand(kv_cache.shape[1], -1))


def kept_gates(gates: torch.Tensor, kept: int, sinks: int, window: int, unit: int) -> torch.Tensor:
    """Value weights [H, sinks + kept + window] of all rows read; 1 for sinks and window."""
    heads = gates.shape[0]
    middle = gates[:, : kept // unit].repeat_interleave(unit, dim=1)
    return torch.cat([torch.ones(heads, sinks), middle, torch.ones(heads, window)], dim=1)


def attend_rows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one query over cache rows.

    Args:
        query: [Hq, D]; kv_cache: [num_blocks, H, page, 2 * D].
        rows: [H, m] rows of ``kv_rows(kv_cache)``; gates: [H, m] value weights or None.
        scale: softmax scale.

    Returns:
        [Hq, D].
    """
    heads, head_dim = rows.shape[0], query.shape[-1]
    table, _ = kv_rows(kv_cache)
    found = table.index_select(0, rows.flatten()).view(heads, 1, -1, 2 * head_dim)
    key, value = found.split(head_dim, dim=-1)
    if gates is not None:
        value = (value.float() * gates[:, None, :, None]).to(value.dtype)
    # the query heads of a group are queries of one KV head: all see the same tokens
    q = query.view(heads, 1, -1, head_dim)
    return F.scaled_dot_product_attention(q, key, value, scale=scale).view(-1, head_dim)


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See ``reference.decode``."""
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        kept = kept_rows(kv_cache, block_table[row], units[item], position, budget)
        window = window_rows(kv_cache, block_table[row], position, budget)
        gate = None
        if gates is not None:
            sinks = min(budget.first_unit() * budget.unit, position + 1)
            gate = kept_gates(
                gates[item], kept.shape[1] - sinks, sinks, window.shape[1], budget.unit
            )
        rows = torch.cat([kept, window], dim=1)
        out[item] = attend_rows(query[item], kv_cache, rows, gate, scale)
