"""Specification of sparse prefill, and the brute-force definition it is held to."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.reference import attend_one


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
    """Several queries per item, all inside one refresh block of R positions.

    Args:
        query: [rows, T, Hq, D]; a stride of 0 where all rows share the tokens of a batch.
        key_cache, value_cache: [num_blocks, H, page, D].
        block_table: [rows, max_blocks] int32.
        item_row: [items] int32 (negative: skip).
        item_position: [items] int32, absolute position of the item's first query.
        item_query_start: [items] int32, token index of the item's first query in ``query``.
        item_query_len: [items] int32, queries of the item, 1..R.
        units: [items, H, K] int32; gates: [items, H, K] float32 or None.
        budget, scale: the budget and the softmax scale.
        out: [rows, T, Hq, D], written in place for the items' queries only.
        kv_scales: see ``attend_one``.
    """
    for item, row in enumerate(item_row.tolist()):
        if row < 0:
            continue
        start, length = int(item_query_start[item]), int(item_query_len[item])
        for offset in range(length):
            out[row, start + offset] = attend_one(
                query[row, start + offset], key_cache, value_cache, block_table[row],
                int(item_position[item]) + offset, units[item],
                None if gates is None else gates[item], budget, scale, kv_scales,
            )  # fmt: skip


def brute_force(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    budget: Budget,
    scale: float,
) -> torch.Tensor:
    """SparseK attention in mode hard, token granularity, straight from the definition.

    For every query: count, for every token that has left the window, how many tokens that
    have left it score higher (equal scores: earlier stays); visible are the sinks, the
    window and the tokens beaten by fewer than k. No pages, no blocks, no selection lists.

    Args:
        query: [n, Hq, D]; key, value: [n, H, D]; scores: [n, H]. One request from position 0.

    Returns:
        [n, Hq, D].
    """
    n, query_heads, _ = query.shape
    heads = key.shape[1]
    out = torch.empty_like(query)
    for i in range(n):
        at = i // budget.refresh * budget.refresh
        for q_head in range(query_heads):
            head = q_head // (query_heads // heads)
            left = [j for j in range(budget.sinks, i + 1) if at - j >= budget.window]
            seen = list(range(min(budget.sinks, i + 1)))
            for j in left:
                u = scores[j, head]
                beaten = sum(
                    1 for o in left if scores[o, head] > u or (scores[o, head] == u and o < j)
                )
                if beaten < budget.of_heads(slice(head, head + 1)).tokens_kept(at):
                    seen.append(j)
            seen += [j for j in range(budget.sinks, i + 1) if at - j < budget.window]
            weights = torch.softmax(key[seen, head] @ query[i, q_head] * scale, dim=0)
            out[i, q_head] = weights @ value[seen, head]
    return out
