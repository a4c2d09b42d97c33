"""Sparse prefill on the CPU: one gather and one masked attention per item."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.gather import (
    cache_rows,
    kept_gates,
    kept_positions,
    scale_numbers,
    take_rows,
    weigh_values,
    window_positions,
)


def prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    item_query_start: torch.Tensor,
    item_query_len: torch.Tensor,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    scale: float,
    out: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``reference.prefill``."""
    heads, head_dim = key_cache.shape[1], query.shape[-1]
    if budget.heads:
        group = query.shape[2] // heads
        for part, own in budget.by_heads(heads):
            mine = slice(part.start * group, part.stop * group)
            prefill(
                query[:, :, mine], key_cache[:, part], value_cache[:, part], block_table, item_row,
                item_position, item_query_start, item_query_len, units[:, part],
                None if gates is None else gates[:, part], own, scale, out[:, :, mine], kv_scales,
            )  # fmt: skip
        return
    same_rows = key_cache.stride() == value_cache.stride()
    k_scale, v_scale = scale_numbers(kv_scales)
    for item, (row, first, start, length) in enumerate(
        zip(
            item_row.tolist(), item_position.tolist(), item_query_start.tolist(),
            item_query_len.tolist(), strict=True,
        )
    ):  # fmt: skip
        if row < 0:
            continue
        last = first + length - 1
        kept = kept_positions(units[item], first, last, budget)
        position = torch.cat([kept, window_positions(heads, first, last, budget)], dim=1)
        rows = cache_rows(key_cache, block_table[row], position)
        key = take_rows(key_cache, rows, query.dtype)
        if not same_rows:
            rows = cache_rows(value_cache, block_table[row], position)
        gate = None if gates is None else kept_gates(gates[item], kept.shape[1], budget)
        value = weigh_values(take_rows(value_cache, rows, query.dtype), gate)
        q = query[row, start : start + length].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        mask = None
        if length > 1:
            # kept units lie before every query: any head's positions give the causal mask
            mask = torch.arange(first, first + length)[:, None] >= position[0]
        group = q.shape[1]
        o = F.scaled_dot_product_attention(
            q, key[:, None].expand(-1, group, -1, -1), value[:, None].expand(-1, group, -1, -1),
            attn_mask=mask, scale=scale * k_scale,
        )  # fmt: skip
        if kv_scales is not None:
            o = o * v_scale
        out[row, start : start + length] = o.permute(2, 0, 1, 3).reshape(length, -1, head_dim)
