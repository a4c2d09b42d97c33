"""Sparse decode on the CPU: gather what is kept, then torch's attention kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.gather import gather_visible


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
    heads, head_dim = kv_cache.shape[1], query.shape[-1]
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        key, value, _ = gather_visible(
            kv_cache, block_table[row], position, position, units[item],
            None if gates is None else gates[item], budget,
        )  # fmt: skip
        # the query heads of a group are queries of one KV head: all see the same tokens
        q = query[item].view(heads, 1, -1, head_dim)
        o = F.scaled_dot_product_attention(q, key[:, None], value[:, None], scale=scale)
        out[item] = o.view(-1, head_dim)
