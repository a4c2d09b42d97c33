"""Decode by FlashAttention-3: every (KV head, item) is a request, its list a page table."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common import page_tables
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.page_tables import attend, make_tables
from vllm_sparsek.kernels.common.validate import FP8


def fits(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> tuple[bool, str]:
    """See ``page_tables.fits``; decode keeps its queries as they are, so fp8 caches do not."""
    if key_cache.dtype == FP8:
        return False, f"the cache is {FP8}: decode's queries would be rounded to it"
    return page_tables.fits(query, key_cache, value_cache, gates, budget)


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
