"""Sparse decode on the CPU: gather what is kept, then torch's attention kernel."""

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


def attend_rows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of one query over cache rows.

    Args:
        query: [Hq, D]; kv_cache: [num_blocks, H, page, 2 * D].
        rows: [H, m], see ``cache_rows``; gates: [H, g] or None, see ``weigh_values``.
        scale: softmax scale; kv_scales: see ``reference.attend_one``.

    Returns:
        [Hq, D].
    """
    heads, head_dim = rows.shape[0], query.shape[-1]
    key, value = take_rows(kv_cache, rows, query.dtype).split(head_dim, dim=-1)
    value = weigh_values(value, gates)
    # the query heads of a group are queries of one KV head: all see the same tokens
    q = query.view(heads, 1, -1, head_dim)
    k_scale, v_scale = scale_numbers(kv_scales)
    o = F.scaled_dot_product_attention(q, key[:, None], value[:, None], scale=scale * k_scale)
    if kv_scales is not None:
        o = o * v_scale
    return o.view(-1, head_dim)


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
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``reference.decode``."""
    if budget.heads:
        group = query.shape[1] // kv_cache.shape[1]
        for part, own in budget.by_heads(kv_cache.shape[1]):
            mine = slice(part.start * group, part.stop * group)
            decode(
                query[:, mine], kv_cache[:, part], block_table, item_row, item_position,
                units[:, part], None if gates is None else gates[:, part], own, scale,
                out[:, mine], kv_scales,
            )  # fmt: skip
        return
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        kept = kept_positions(units[item], position, position, budget)
        window = window_positions(kept.shape[0], position, position, budget)
        gate = None if gates is None else kept_gates(gates[item], kept.shape[1], budget)
        rows = cache_rows(kv_cache, block_table[row], torch.cat([kept, window], dim=1))
        out[item] = attend_rows(query[item], kv_cache, rows, gate, scale, kv_scales)
