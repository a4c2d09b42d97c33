"""Argument checks of attention over a selection, shared by decode and prefill."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_HEAD_DIMS = (64, 80, 96, 128, 256)


def kernel_takes(query: torch.Tensor) -> tuple[bool, str]:
    """Whether the Triton attention kernels take this head size and dtype, and why not."""
    if query.shape[-1] not in KERNEL_HEAD_DIMS:
        return False, f"head_dim is {query.shape[-1]}: the Triton kernels take {KERNEL_HEAD_DIMS}"
    if query.dtype not in KERNEL_FLOATS:
        return False, f"query is {query.dtype}: the Triton kernels take {KERNEL_FLOATS}"
    return True, ""


def check_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    out: torch.Tensor,
) -> None:
    """Refuse arguments that no implementation takes; attribute comparisons only, no sync.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    device = query.device
    check_tensor("query", query, 3, FLOATS, device)
    check_tensor("kv_cache", kv_cache, 4, query.dtype, device)
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("item_row", item_row, 1, torch.int32, device)
    check_tensor("item_position", item_position, 1, torch.int32, device)
    check_tensor("units", units, 3, torch.int32, device)
    check_tensor("out", out, 3, query.dtype, device)
    _, heads, page, width = kv_cache.shape
    query_heads, head_dim = query.shape[1:]
    if width != 2 * head_dim:
        raise ValueError(f"kv_cache must end in 2 * D = {2 * head_dim} numbers, got {width}")
    if kv_cache.stride(2) < width:
        raise ValueError(f"kv_cache tokens overlap: strides {kv_cache.stride()}")
    if query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, not a multiple of the {heads} KV heads")
    if budget.unit > 1 and budget.unit % page and page % budget.unit:
        raise ValueError(f"budget.unit {budget.unit} and the page of kv_cache {page} do not nest")
    items = item_row.shape[0]
    check_shape("item_position", item_position, (items,))
    check_shape("units", units, (items, heads, units.shape[2]))
    check_shape("out", out, tuple(query.shape))
    if gates is not None:
        check_tensor("gates", gates, 3, torch.float32, device)
        check_shape("gates", gates, tuple(units.shape))
        if gates.stride() != units.stride():
            raise ValueError(f"gates must have the strides of units, {units.stride()}")
