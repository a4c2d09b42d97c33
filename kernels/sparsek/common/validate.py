"""Argument checks of attention over a selection, shared by decode and prefill."""

from __future__ import annotations

from collections.abc import Mapping

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
    caches: Mapping[str, torch.Tensor],
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    out: torch.Tensor,
) -> None:
    """Refuse arguments that no implementation takes; attribute comparisons only, no sync.

    Args:
        query: [..., Hq, D]; caches: by name [num_blocks, H, page, 2 * D], keys then values, or
            two of [num_blocks, H, page, D]; the others: see decode and prefill.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    device = query.device
    check_tensor("query", query, query.dim(), FLOATS, device)
    query_heads, head_dim = query.shape[-2:]
    width = 2 * head_dim if len(caches) == 1 else head_dim
    for name, cache in caches.items():
        check_tensor(name, cache, 4, query.dtype, device)
        if cache.shape[3] != width:
            raise ValueError(
                f"{name} must end in {width} numbers for queries of head_dim {head_dim}, "
                f"got shape {tuple(cache.shape)}"
            )
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("item_row", item_row, 1, torch.int32, device)
    check_tensor("item_position", item_position, 1, torch.int32, device)
    check_tensor("units", units, 3, torch.int32, device)
    check_tensor("out", out, query.dim(), query.dtype, device)
    (name, first), *others = caches.items()
    _, heads, page, _ = first.shape
    for other, cache in others:
        check_shape(other, cache, tuple(first.shape))
    if query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, not a multiple of the {heads} KV heads")
    # a row that is one block has no page borders
    if block_table.shape[1] > 1 and budget.unit % page and page % budget.unit:
        raise ValueError(f"budget.unit {budget.unit} and the page of {name} {page} do not nest")
    items = item_row.shape[0]
    check_shape("item_position", item_position, (items,))
    check_shape("units", units, (items, heads, units.shape[2]))
    check_shape("out", out, tuple(query.shape))
    if gates is not None:
        check_tensor("gates", gates, 3, torch.float32, device)
        check_shape("gates", gates, tuple(units.shape))
        if gates.stride() != units.stride():
            raise ValueError(f"gates must have the strides of units, {units.stride()}")
