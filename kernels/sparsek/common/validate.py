"""Argument checks of attention over a selection, shared by decode and prefill."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# of a quantised cache: a number times the cache's scale is the key or value
FP8 = torch.float8_e4m3fn
# the first compute capability whose conversions from FP8 Triton compiles
FP8_CAPABILITY = 89
KERNEL_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_HEAD_DIMS = (64, 80, 96, 128, 256)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Compute capability of a GPU: 90 means 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def kernel_takes(query: torch.Tensor, cache: torch.Tensor) -> tuple[bool, str]:
    """Whether the Triton attention kernels take this head size and these dtypes, and why not."""
    if query.shape[-1] not in KERNEL_HEAD_DIMS:
        return False, f"head_dim is {query.shape[-1]}: the Triton kernels take {KERNEL_HEAD_DIMS}"
    if query.dtype not in KERNEL_FLOATS:
        return False, f"query is {query.dtype}: the Triton kernels take {KERNEL_FLOATS}"
    if cache.dtype == FP8 and query.is_cuda and compute_capability(query.device) < FP8_CAPABILITY:
        return False, f"the cache is {FP8}: that takes a GPU of compute capability 8.9 or later"
    return True, ""


def check_heads(budget: Budget, heads: int) -> None:
    """Refuse a budget of KV heads that are not as many as there are: ValueError."""
    if budget.heads and len(budget.heads) != heads:
        raise ValueError(f"budget.heads is of {len(budget.heads)} KV heads, there are {heads}")


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
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
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
    (name, first), *others = caches.items()
    check_tensor(name, first, 4, (query.dtype, FP8), device)
    if first.shape[3] != width:
        raise ValueError(
            f"{name} must end in {width} numbers for queries of head_dim {head_dim}, got shape "
            f"{tuple(first.shape)}"
        )
    for other, cache in others:
        check_tensor(other, cache, 4, first.dtype, device)
        check_shape(other, cache, tuple(first.shape))
    check_kv_scales(kv_scales, name, first, device)
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("item_row", item_row, 1, torch.int32, device)
    check_tensor("item_position", item_position, 1, torch.int32, device)
    check_tensor("units", units, 3, torch.int32, device)
    check_tensor("out", out, query.dim(), query.dtype, device)
    _, heads, page, _ = first.shape
    if query_heads % heads:
        raise ValueError(f"query has {query_heads} heads, not a multiple of the {heads} KV heads")
    check_heads(budget, heads)
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


def check_kv_scales(
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
    name: str,
    cache: torch.Tensor,
    device: torch.device,
) -> None:
    """Refuse scales that are not two float32 numbers of an fp8 cache called ``name``.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    if (cache.dtype == FP8) != (kv_scales is not None):
        raise ValueError(
            f"kv_scales go with a {FP8} cache and no other: {name} is {cache.dtype}, "
            f"kv_scales are {'missing' if kv_scales is None else 'given'}"
        )
    for scale_name, scale in zip(("k_scale", "v_scale"), kv_scales or (), strict=False):
        if scale.dtype != torch.float32:
            raise TypeError(f"kv_scales {scale_name} must be torch.float32, got {scale.dtype}")
        if scale.numel() != 1 or scale.device != device:
            raise ValueError(
                f"kv_scales {scale_name} must be one number on {device}, got shape "
                f"{tuple(scale.shape)} on {scale.device}"
            )
