"""Prefill on Hopper, in Gluon, since Triton does not split a program's warps by task.

Keys and values cross L2 once for 128 (query, head) rows. Kept units and the block table are read as
they are: no list is written. The device code is in ``hopper_device``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.compile_targets import of_heads
from vllm_sparsek.kernels.common.device import (
    budget_arguments,
    page_argument,
    slots_per_block,
)
from vllm_sparsek.kernels.common.validate import compute_capability
from vllm_sparsek.kernels.prefill.hopper_device import (
    FIELDS,
    prefill_hopper_fwd_kernel,
    tiles_fwd_kernel,
)

CAPABILITY = 90
WARPGROUP_ROWS = 64  # of one warpgroup's products
CONSUMERS = 2
BLOCK_M = WARPGROUP_ROWS * CONSUMERS
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # elements: what strides are a multiple of, so that 16 bytes are copied at a time
LONG_LIST = 1024  # tokens from which tiles of 128 keys pay
STAGE_BYTES = 1 << 17  # of shared memory for keys and values
TILES_BLOCK, TILES_WARPS = 128, 4  # of ``tiles_fwd_kernel``


def tile_sizes(head_dim: int, budget: Budget, max_units: int) -> dict[str, int]:
    """Tile choices from shapes alone: a query's result must not depend on the batch."""
    longest = (budget.first_unit() + max_units) * budget.unit + budget.window + budget.refresh
    return stages(head_dim, 128 if longest >= LONG_LIST else 64)


def stages(head_dim: int, block: int) -> dict[str, int]:
    """As many tiles of ``block`` keys and values, two bytes a number, as there is room for."""
    return {"BLOCK_N": block, "STAGES": STAGE_BYTES // (2 * 2 * block * head_dim)}


def fits(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> tuple[bool, str]:
    """Whether this kernel can attend over the lists of a call, and why not.

    Args:
        query: [..., D]; key_cache, value_cache: [num_blocks, H, page, D]; gates, budget: as
            prefill's.
    """
    if query.device.type != "cuda" or compute_capability(query.device) != CAPABILITY:
        return False, f"it runs on GPUs of compute capability 9.0, not on {query.device}"
    if query.dtype not in DTYPES:
        return False, f"query is {query.dtype}: it takes {DTYPES}"
    if key_cache.dtype != query.dtype:
        return False, f"the cache is {key_cache.dtype}: only one of the query's dtype will do"
    if gates is not None:
        return False, "gates are given: it weighs no values"
    if query.shape[-1] not in HEAD_DIMS:
        return False, f"head_dim is {query.shape[-1]}: it must be one of {HEAD_DIMS}"
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.data_ptr() % 16 or any(s % ALIGNMENT for s in tensor.stride()[:-1]):
            return False, f"{name}: rows must lie a multiple of {ALIGNMENT} elements apart"
    if key_cache.stride(2) != value_cache.stride(2) or key_cache.stride(0) != value_cache.stride(0):
        return False, "key_cache and value_cache do not lie alike"
    if slots_per_block(key_cache) is None:
        return False, "blocks of the cache must lie a whole number of tokens apart"
    return True, ""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs are resident on ``device``: one has a multiprocessor for itself."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    """See ``reference.prefill``; ``fits`` says for which arguments."""
    items = item_row.shape[0]
    if items == 0:
        return
    tokens, query_heads, head_dim = query.shape[1:]
    heads, page = key_cache.shape[1:3]
    group = query_heads // heads
    # no item can have more queries than the batch has tokens
    m_tiles = triton.cdiv(min(budget.refresh, tokens) * group, BLOCK_M)
    tiles = items * heads * m_tiles
    sizes = tile_sizes(head_dim, budget, units.shape[2])
    plan = torch.empty((tiles, FIELDS.value), dtype=torch.int32, device=query.device)
    tiles_fwd_kernel[(triton.cdiv(tiles, TILES_BLOCK),)](
        item_row, item_position, item_query_start, item_query_len, plan, items, m_tiles, tiles,
        *budget_arguments(budget, query.device), units.shape[2],
        G=group, UNIT=budget.unit, BLOCK_M=BLOCK_M, BLOCK_N=sizes["BLOCK_N"], FIELDS=FIELDS.value,
        BLOCK=TILES_BLOCK, num_warps=TILES_WARPS,
    )  # fmt: skip
    prefill_hopper_fwd_kernel[(min(tiles, multiprocessors(query.device)),)](
        query, key_cache, value_cache, block_table, units, plan, out, scale * math.log2(math.e),
        tiles, slots_per_block(key_cache), block_table.stride(0), *units.stride()[:2],
        *query.stride()[:3], key_cache.stride(1), value_cache.stride(1), key_cache.stride(2),
        *out.stride()[:3],
        G=group, D=head_dim, UNIT=budget.unit, PAGE=page_argument(page, block_table.shape[1]),
        ROWS=WARPGROUP_ROWS, GROUPS=CONSUMERS, **sizes, num_warps=4,
    )  # fmt: skip


_TYPES = (
    "*{0} *{0} *{0} *i32 *i32 *i32 *{0} fp32 i32 i32 i32 i64 i64 i64 i32 i32 i64 i64 i32 i64 i32 "
    "i32"
)


def compile_case(
    dtype: str, group: int, head_dim: int, unit: int, page: int, block: int
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of the kernel, as ``common/compile_targets.py`` takes it."""
    constexprs = {
        "G": group, "D": head_dim, "UNIT": unit, "PAGE": page, "ROWS": WARPGROUP_ROWS,
        "GROUPS": CONSUMERS, **stages(head_dim, block),
    }  # fmt: skip
    return prefill_hopper_fwd_kernel, _TYPES.format(dtype), constexprs, {"num_warps": 4}


TILES_CASE: tuple[Any, str, dict[str, Any], dict[str, int]] = (
    tiles_fwd_kernel,
    "*i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 i32 i32 i32 i64 i32",
    {
        "G": 4, "UNIT": 16, "BLOCK_M": BLOCK_M, "BLOCK_N": 64, "FIELDS": FIELDS.value,
        "BLOCK": TILES_BLOCK,
    },
    {"num_warps": TILES_WARPS},
)  # fmt: skip
COMPILE_CASES = [
    compile_case("bf16", 4, 128, 1, 16, 128),
    compile_case("fp16", 1, 128, 16, 0, 64),
    compile_case("fp16", 3, 64, 1, 16, 64),
    TILES_CASE,
    of_heads(TILES_CASE),
]
