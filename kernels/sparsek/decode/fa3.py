"""Decode by FlashAttention-3: every (KV head, item) is a request, its list a page table."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.page_tables import attend, fits, make_tables

__all__ = ["decode", "fits"]


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
    """See ``reference.decode``; ``fits`` says for which arguments.

    Shapes alone decide what is launched, so a CUDA graph may hold it.
    """
    items, query_heads, head_dim = query.shape
    if items == 0:
        return
    heads = kv_cache.shape[1]
    key_cache, value_cache = kv_cache.chunk(2, dim=-1)
    tables = make_tables(key_cache, block_table, item_row, item_position, None, units, budget, 1)
    by_head = query.reshape(items * heads, query_heads // heads, head_dim)
    found = attend(by_head, key_cache, value_cache, tables, 1, scale).view(query.shape)
    # padding items keep what they had
    torch.where(item_row[:, None, None] >= 0, found, out, out=out)
