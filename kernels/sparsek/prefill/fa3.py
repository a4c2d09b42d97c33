"""Prefill by FlashAttention-3: every (KV head, item) is a request, its list a page table."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.page_tables import attend, fits, make_tables, move_rows

__all__ = ["fits", "prefill"]


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
    """See ``reference.prefill``; ``fits`` says for which arguments.

    FlashAttention-3 has one stride from a request's query to the next, and rows of all requests in
    one tensor. Queries of one KV head lie Hq * D apart and those of the next begin G * D behind
    them, so that no view orders them by head: they are copied, and results copied back. A call
    per head would need no copies, and H launches that each fill the GPU for a moment.
    """
    items = item_row.shape[0]
    if items == 0:
        return
    tokens, query_heads, head_dim = query.shape[1:]
    heads = key_cache.shape[1]
    # no item can have more queries than the batch has tokens
    most = min(budget.refresh, tokens)
    tables = make_tables(
        key_cache, block_table, item_row, item_position, item_query_len, units, budget, most
    )
    owners = item_row, item_query_start, item_query_len
    shape = (heads, items, most, query_heads // heads, head_dim)
    packed = query.new_empty(shape, dtype=key_cache.dtype)
    move_rows(query, packed, *owners, pack=True)
    found = attend(
        packed.flatten(0, 2), key_cache, value_cache, tables, budget.refresh, scale, kv_scales
    )
    move_rows(out, found.to(out.dtype).view(shape), *owners, pack=False)
