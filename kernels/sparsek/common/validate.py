"""Argument checks of attention over a selection, shared by decode and prefill."""

from __future__ import annotations

import functools

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
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def kernel_takes(query: torch.Tensor, kv_cache: torch.Tensor) -> tuple[bool, str]:
    """Whether the Triton attention kernels take this head size and these dtypes, and why not."""
    if query.shape[-1] not in KERNEL_HEAD_DIMS:
        return False, f"head_dim is {query.shape[-1]}: the Triton kernels take {KERNEL_HEAD_DIMS}"
    if query.dtype not in KERNEL_FLOATS:
        return False, f"query is {query.dtype}: the Triton kernels take {KERNEL_FLOATS}"
    if kv_cache.dtype == FP8 and query.is_cuda and _capability(query.device) < FP8_CAPABILITY:
        return False, f"kv_cache is {FP8}: that takes a GPU of compute capability 8.9 or later"
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
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Refuse arguments that no implementation takes; attribute comparisons only, no sync.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    device = query.device
    check_tensor("query", query, 3, FLOATS, device)
    check_tensor("kv_cache", kv_cache, 4, (query.dtype, FP8), device)
    if (kv_cache.dtype == FP8) != (kv_scales is not None):
        raise ValueError(
            f"kv_scales go with a {FP8} kv_cache and no other: kv_cache is {kv_cache.dtype}, "
            f"kv_scales are {'missing' if kv_scales is None else 'given'}"
        )
    for name, scale in zip(("k_scale", "v_scale"), kv_scales or (), strict=False):
        if scale.dtype != torch.float32:
            raise TypeError(f"kv_scales {name} must be torch.float32, got {scale.dtype}")
        if scale.numel() != 1 or scale.device != device:
            raise ValueError(
                f"kv_scales {name} must be one number on {device}, got shape "
                f"{tuple(scale.shape)} on {scale.device}"
            )
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
