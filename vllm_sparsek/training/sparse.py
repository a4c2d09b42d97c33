"""Sparse attention inside transformers, by the kernels that serve it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.select import api as select_api

PAGE = 64


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of query [Hq, n, D] over key, value [H, n, D]: [Hq, n, D]."""
    group = query.shape[0] // key.shape[0]
    key, value = (t.repeat_interleave(group, 0)[None] for t in (key, value))
    return F.scaled_dot_product_attention(query[None], key, value, is_causal=True, scale=scale)[0]


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    budget: Budget,
    scale: float,
) -> torch.Tensor:
    """Causal attention of one request from position 0, every query beyond the budget sparse.

    Args:
        query: [Hq, n, D]; key, value: [H, n, D].
        scores: [H, n] float32.
        budget: of token granularity.
        scale: softmax scale.

    Returns:
        [Hq, n, D].
    """
    heads, n, _ = key.shape
    if budget.heads:
        group = query.shape[0] // heads
        return torch.cat([
            sparse_attention(
                query[part.start * group : part.stop * group], key[part], value[part],
                scores[part], own, scale,
            )
            for part, own in budget.by_heads(heads)
        ])  # fmt: skip
    first = budget.first_sparse_position(n)
    dense = dense_attention(query[:, :first], key[:, :first], value[:, :first], scale)
    if first >= n:
        return dense
    pages = -(-n // PAGE)
    padding = (0, 0, 0, pages * PAGE - n)
    cache = F.pad(torch.cat([key, value], -1), padding).view(heads, pages, PAGE, -1)
    paged_scores = F.pad(scores, padding[2:]).view(heads, pages, PAGE).transpose(0, 1).contiguous()
    kv_cache = cache.transpose(0, 1).contiguous()
    # items: one a refresh block
    device = query.device
    position = torch.arange(first, n, budget.refresh, dtype=torch.int32, device=device)
    row = torch.zeros_like(position)
    length = (n - position).clamp(max=budget.refresh).int()
    table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    shape = (len(position), heads, budget.max_units(n))
    units = torch.empty(shape, dtype=torch.int32, device=device)
    select_api.select(paged_scores, table, row, position, budget, "lse", False, units)
    q = query.transpose(0, 1).contiguous()
    out = torch.empty_like(q)
    prefill_api.prefill(
        q, *kv_cache.chunk(2, dim=-1), table, row, position, position, length, units, None, budget,
        scale, out,
    )  # fmt: skip
    return torch.cat([dense, out[first:].transpose(0, 1)], dim=1)
