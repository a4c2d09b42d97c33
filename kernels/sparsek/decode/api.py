"""Decode: attention of one query per item over its selection."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import (
    check_shape,
    check_tensor,
    require,
)
from vllm_sparsek.kernels.common.engines import attention_module
from vllm_sparsek.kernels.common.validate import FLOATS, check_attention, kernel_takes
from vllm_sparsek.kernels.decode.splits import workspace_shapes

__all__ = ["decode", "workspace_shapes"]


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
    workspace: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_tokens: int | None = None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    after: torch.cuda.Event | None = None,
    impl: str = "auto",
) -> None:
    """One query per item: ``out[i]`` is written for every item with ``item_row[i] >= 0``.

    Args:
        query: [items, Hq, D]; kv_cache: [num_blocks, H, page, 2 * D] of the same dtype or
            float8_e4m3fn.
        block_table: [rows, max_blocks] int32.
        item_row: [items] int32 (negative: skip, ``out[i]`` keeps its value).
        item_position: [items] int32, absolute position of the query.
        units: [items, H, K] int32; gates: [items, H, K] float32 or None.
        budget, scale: the budget and the softmax scale.
        out: [items, Hq, D], written in place.
        workspace: the tensors of ``workspace_shapes``, contiguous float32, contents
            irrelevant. Without it the call allocates, which CUDA graphs may not want.
        max_tokens: upper bound of the tokens any item reads; sizes grid and workspace, and a
            result is the same to the last bit only under the same bound. By default what the
            block table can address.
        kv_scales: k_scale and v_scale, float32 tensors of one element; a float8_e4m3fn cache
            times them gives keys and values. Needed with such a cache only.
        after: ``out`` is not written before this event of another stream, which the current
            stream has waited for when the call returns.
        impl: auto, triton, fa3, cpu or reference; auto on a GPU: what ``configs/engines`` says.
            Workspace and ``max_tokens`` are Triton's.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensor("query", query, 3, FLOATS, query.device)
    check_shape("query", query, (item_row.shape[0], *query.shape[1:]))
    check_attention(
        query, {"kv_cache": kv_cache}, block_table, item_row, item_position, units, gates, budget,
        out, kv_scales,
    )  # fmt: skip
    group = query.shape[1] // kv_cache.shape[1]
    module = attention_module("decode", impl, query, group, kv_cache, kv_cache, gates, budget)
    arguments = (
        query, kv_cache, block_table, item_row, item_position, units, gates, budget, scale, out,
    )  # fmt: skip
    if not module.__name__.endswith("triton"):
        if after is not None:
            after.wait()
        module.decode(*arguments, kv_scales)
        return
    items, query_heads, head_dim = query.shape
    require(kernel_takes(query, kv_cache))
    if max_tokens is None:
        max_tokens = budget.max_tokens_attended(block_table.shape[1] * kv_cache.shape[2])
    shapes = workspace_shapes(items, query_heads, head_dim, max_tokens)
    if workspace is None:
        workspace = tuple(
            torch.empty(shape, dtype=torch.float32, device=query.device) for shape in shapes
        )
    for name, tensor, shape in zip(("acc", "stats"), workspace, shapes, strict=True):
        check_tensor(f"workspace {name}", tensor, 4, torch.float32, query.device)
        check_shape(f"workspace {name}", tensor, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"workspace {name} must be contiguous, got {tensor.stride()}")
    module.decode(*arguments, workspace, max_tokens, kv_scales, after)
