"""Prefill: attention of several queries per item over the selection they share."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import (
    check_shape,
    check_tensor,
    require,
)
from vllm_sparsek.kernels.common.engines import attention_module
from vllm_sparsek.kernels.common.validate import check_attention, kernel_takes


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
    impl: str = "auto",
) -> None:
    """Several queries per item, all inside one refresh block of R positions.

    Args:
        query: [T, Hq, D], all tokens of the batch; or [rows, T, Hq, D]: every row of the block
            table has tokens of its own.
        key_cache, value_cache: [num_blocks, H, page, D] of the same dtype or float8_e4m3fn, any
            strides: two tensors, or the halves of vLLM's packed cache. Triton copies both if
            their blocks are not the same whole number of tokens apart.
        block_table: [rows, max_blocks] int32. With one column a row is one block.
        item_row: [items] int32 (negative: skip).
        item_position: [items] int32, absolute position of the item's first query.
        item_query_start: [items] int32, token index of the item's first query in ``query``.
        item_query_len: [items] int32, queries of the item, 1..R.
        units: [items, H, K] int32; gates: [items, H, K] float32 or None.
        budget, scale: the budget and the softmax scale.
        out: of query's shape, written in place for the items' queries only.
        kv_scales: k_scale and v_scale, float32 tensors of one element; a float8_e4m3fn cache
            times them gives keys and values. Needed with such a cache only.
        impl: auto, triton, fa3, hopper, cpu or reference; auto on a GPU: what ``configs/engines``
            says.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    if query.dim() not in (3, 4):
        raise ValueError(f"query must have 3 or 4 dimensions, got shape {tuple(query.shape)}")
    check_attention(
        query, {"key_cache": key_cache, "value_cache": value_cache}, block_table, item_row,
        item_position, units, gates, budget, out, kv_scales,
    )  # fmt: skip
    rows = block_table.shape[0]
    if query.dim() == 4:
        check_shape("query", query, (rows, *query.shape[1:]))
    else:
        # all rows share the tokens of the batch
        query, out = query.expand(rows, -1, -1, -1), out.expand(rows, -1, -1, -1)
    check_tensor("item_query_start", item_query_start, 1, torch.int32, query.device)
    check_tensor("item_query_len", item_query_len, 1, torch.int32, query.device)
    check_shape("item_query_start", item_query_start, tuple(item_row.shape))
    check_shape("item_query_len", item_query_len, tuple(item_row.shape))
    shared = budget.refresh * (query.shape[2] // key_cache.shape[1])
    module = attention_module("prefill", impl, query, shared, key_cache, value_cache, gates, budget)
    if module.__name__.endswith("triton"):
        require(kernel_takes(query, key_cache))
    module.prefill(
        query, key_cache, value_cache, block_table, item_row, item_position, item_query_start,
        item_query_len, units, gates, budget, scale, out, kv_scales,
    )  # fmt: skip
