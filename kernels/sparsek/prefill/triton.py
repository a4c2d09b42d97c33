"""Attention of the queries of one refresh block over the list that they share."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.compile_targets import of_heads
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    MIN_BLOCK_M,
    budget_arguments,
    list_bounds,
    list_gates,
    list_positions,
    of_head,
    page_argument,
    slots_per_block,
    softmax_step,
    token_offsets,
)

MAX_BLOCK_M = 64
OPTIONS = {"num_warps": 4, "num_stages": 3}  # of ``prefill_fwd_kernel``
LIST_BLOCK = 1024  # places per program of ``lists_fwd_kernel``
LIST_MULTIPLE = 128  # of the width of lists: a multiple of every BLOCK_N
ITEMS_BLOCK = 256  # items per program of ``items_fwd_kernel``


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "width"])
def lists_fwd_kernel(
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    slots_ptr,  # [items, H, width] int32
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    width,
    per_block,  # slots from one block of the cache to the next
    stride_table_row,
    stride_units_item,
    stride_units_head,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the tokens of lists lie: a slot is as many tokens behind the first one of its head.

    A list is filled up with the item's first query, so that whole tiles can be loaded.
    """
    i_i, i_h = tl.program_id(0), tl.program_id(1)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
    row = tl.load(item_row_ptr + i_i)
    position = tl.load(item_position_ptr + i_i)
    sinks, kept, window_start, total = list_bounds(
        position, position + tl.load(item_query_len_ptr + i_i) - 1, first_unit, window, refresh, k,
        share_bits, max_units, UNIT,
    )  # fmt: skip
    start = tl.program_id(2) * BLOCK
    if (row < 0) | (start >= total):
        return
    o_n = start + tl.arange(0, BLOCK)
    p_units = units_ptr + i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    o_pos, m_n = list_positions(o_n, sinks, kept, window_start, total, p_units, UNIT)
    o_pos = tl.where(m_n, o_pos, position)
    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    b_slot = token_offsets(o_pos, o_n < width, p_table, per_block, 1, PAGE)
    p_slots = slots_ptr + (i_i.to(tl.int64) * tl.num_programs(1) + i_h) * width
    tl.store(p_slots + o_n, b_slot.to(tl.int32), mask=o_n < width)


@triton.jit
def load_rows(
    p, b_slot, stride_token, o_d, dtype: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Keys or values [N, D_PAD] at slots [N]; ``dtype`` holds every number of an fp8 cache."""
    p += b_slot.to(tl.int64)[:, None] * stride_token + o_d[None, :]
    if D < D_PAD:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0).to(dtype)
    return tl.load(p).to(dtype)


@triton.jit
def attend_tile(
    b_s,  # [M, N] logits in base 2, -inf where masked
    b_v,
    b_gate,  # [N] or None
    b_m,
    b_l,
    b_acc,
):
    """One step of attention: the new running maximum, denominator and sums."""
    b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l)
    if b_gate is not None:
        b_p *= b_gate[None, :]
    b_acc = b_acc * b_alpha[:, None]
    b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_m, b_l, b_acc


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "width"])
def prefill_fwd_kernel(
    q_ptr,  # [rows, T, Hq, D]
    k_ptr,  # [num_blocks, H, page, D]
    v_ptr,  # [num_blocks, H, page, D]
    slots_ptr,  # [items, H, width] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32, position of the first query
    item_query_start_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    gates_ptr,  # [items, H, K] float32 (SOFT)
    k_scale_ptr,  # one float32 (FP8)
    v_scale_ptr,  # one float32 (FP8)
    out_ptr,  # [rows, T, Hq, D]
    scale_log2,  # softmax scale * log2(e)
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    width,
    stride_q_row,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_k_token,
    stride_v_head,
    stride_v_token,
    stride_units_item,
    stride_units_head,
    stride_out_row,
    stride_out_token,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    SOFT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M (query, head) pairs of one (item, KV head); the heads of a query lie together."""
    i_i, i_h, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
    row = tl.load(item_row_ptr + i_i)
    queries = tl.load(item_query_len_ptr + i_i)
    if (row < 0) | (i_m * BLOCK_M >= queries * G):
        return
    position = tl.load(item_position_ptr + i_i)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_query = o_m // G
    # the list is read only as far as the last query of this tile can see
    last_query = tl.minimum(queries - 1, (i_m * BLOCK_M + BLOCK_M - 1) // G)
    sinks, kept, window_start, total = list_bounds(
        position, position + last_query, first_unit, window, refresh, k, share_bits, max_units,
        UNIT,
    )  # fmt: skip

    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    m_q = (o_query < queries)[:, None] & m_d[None, :]
    i_row = row.to(tl.int64)
    i_q = (i_h * G + o_m % G).to(tl.int64)
    i_t = tl.load(item_query_start_ptr + i_i).to(tl.int64) + o_query
    p_q = q_ptr + i_row * stride_q_row + (i_t * stride_q_token + i_q * stride_q_head)[:, None]
    p_q += o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [M, D_PAD]

    p_k = k_ptr + i_h.to(tl.int64) * stride_k_head
    p_v = v_ptr + i_h.to(tl.int64) * stride_v_head
    p_slots = slots_ptr + (i_i.to(tl.int64) * tl.num_programs(1) + i_h) * width
    i_units = i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    p_units = units_ptr + i_units
    p_gates = gates_ptr + i_units
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    o_b = tl.arange(0, BLOCK_N)
    # whole tiles of what all queries of the refresh block see need no mask, wherever a chunk of the
    # prompt begins. Queries of a short prompt may not see all sinks; a list of which some unit is
    # missing ends in -1
    listed = sinks + kept * UNIT
    block_start = position // refresh * refresh
    seen = listed + block_start + 1 - window_start
    complete = tl.load(p_units + tl.maximum(kept - 1, 0), mask=kept > 0, other=0) >= 0
    plain = tl.where((block_start >= sinks) & complete, seen // BLOCK_N * BLOCK_N, 0)
    for start in range(0, plain, BLOCK_N):
        b_slot = tl.load(p_slots + start + o_b)
        b_k = load_rows(p_k, b_slot, stride_k_token, o_d, b_q.dtype, D, D_PAD)
        b_v = load_rows(p_v, b_slot, stride_v_token, o_d, b_q.dtype, D, D_PAD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        b_gate = None
        if SOFT:
            b_gate = list_gates(start + o_b, sinks, kept, p_gates, UNIT)
        b_m, b_l, b_acc = attend_tile(b_s, b_v, b_gate, b_m, b_l, b_acc)
    for start in range(plain, total, BLOCK_N):
        o_n = start + o_b
        b_slot = tl.load(p_slots + o_n)
        b_k = load_rows(p_k, b_slot, stride_k_token, o_d, b_q.dtype, D, D_PAD)
        b_v = load_rows(p_v, b_slot, stride_v_token, o_d, b_q.dtype, D, D_PAD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        o_kept = o_n - sinks
        m_kept = (o_kept >= 0) & (o_n < listed)
        m_n = tl.load(p_units + o_kept // UNIT, mask=m_kept, other=0) >= 0
        # all queries see the kept units, which end before the window
        o_pos = tl.where(o_n < sinks, o_n, window_start + o_n - listed)
        o_pos = tl.where(m_kept, 0, o_pos)
        m_s = (m_n & (o_n < total))[None, :] & (o_pos[None, :] <= (position + o_query)[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_gate = None
        if SOFT:
            b_gate = list_gates(o_n, sinks, kept, p_gates, UNIT)
        b_m, b_l, b_acc = attend_tile(b_s, b_v, b_gate, b_m, b_l, b_acc)
    if FP8:
        b_acc = b_acc * tl.load(v_scale_ptr)

    o_out = i_row * stride_out_row + i_t * stride_out_token + i_q * stride_out_head
    p_out = out_ptr + o_out[:, None] + o_d[None, :]
    tl.store(p_out, (b_acc / b_l[:, None]).to(out_ptr.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["queries", "keys", "refresh", "blocks", "items"])
def items_fwd_kernel(
    item_row_ptr,  # [items] int32, as the next three
    item_position_ptr,
    item_query_start_ptr,
    item_query_len_ptr,
    queries,  # of every row, the last of
    keys,
    refresh,
    blocks,  # refresh blocks that the queries of a row touch
    items,  # rows * blocks
    BLOCK: tl.constexpr,
):
    """The items of rows of equal length, for callers that have none on the host."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < items
    first = keys - queries
    b_block = first // refresh + o_i % blocks
    b_position = tl.maximum(b_block * refresh, first)
    tl.store(item_row_ptr + o_i, o_i // blocks, mask=m_i)
    tl.store(item_position_ptr + o_i, b_position, mask=m_i)
    tl.store(item_query_start_ptr + o_i, b_position - first, mask=m_i)
    b_end = tl.minimum((b_block + 1) * refresh, keys)
    tl.store(item_query_len_ptr + o_i, b_end - b_position, mask=m_i)


def tile_sizes(head_dim: int, group: int, refresh: int, itemsize: int) -> dict[str, int]:
    """Tile choices from shapes alone: a query's result must not depend on the batch."""
    d_pad = triton.next_power_of_2(head_dim)
    wide = d_pad * itemsize > 256  # bytes of one key
    rows = triton.next_power_of_2(refresh * group)
    return {
        "D_PAD": d_pad,
        "BLOCK_M": min(MAX_BLOCK_M, max(MIN_BLOCK_M, rows)),
        "BLOCK_N": 32 if wide else 64,
    }


def list_slots(
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    item_query_len: torch.Tensor,
    units: torch.Tensor,
    budget: Budget,
    page: int,
    per_block: int,
) -> torch.Tensor:
    """Where the tokens of all lists lie: [items, H, width] int32, see ``lists_fwd_kernel``.

    Args:
        page: see ``page_argument``; per_block: see ``slots_per_block``; the others: as prefill's.
    """
    items, heads, max_units = units.shape
    longest = (budget.first_unit() + max_units + 1) * budget.unit + budget.window + budget.refresh
    width = triton.cdiv(longest, LIST_MULTIPLE) * LIST_MULTIPLE
    slots = torch.empty((items, heads, width), dtype=torch.int32, device=units.device)
    lists_fwd_kernel[(items, heads, triton.cdiv(width, LIST_BLOCK))](
        block_table, item_row, item_position, item_query_len, units, slots,
        *budget_arguments(budget, units.device), max_units, width, per_block,
        block_table.stride(0), units.stride(0), units.stride(1),
        PAGE=page, UNIT=budget.unit, BLOCK=LIST_BLOCK, num_warps=4,
    )  # fmt: skip
    return slots


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
    """See ``reference.prefill``."""
    items = item_row.shape[0]
    if items == 0:
        return
    tokens, query_heads, head_dim = query.shape[1:]
    heads, page = key_cache.shape[1:3]
    group = query_heads // heads
    if slots_per_block(key_cache) is None or (
        slots_per_block(key_cache) != slots_per_block(value_cache)
    ):
        # contiguous() would keep any stride of a size of 1, which may be no divisor either
        key_cache = key_cache.clone(memory_format=torch.contiguous_format)
        value_cache = value_cache.clone(memory_format=torch.contiguous_format)
    slots = list_slots(
        block_table, item_row, item_position, item_query_len, units, budget,
        page_argument(page, block_table.shape[1]), slots_per_block(key_cache) or 0,
    )  # fmt: skip
    # no item can have more queries than the batch has tokens
    tiles = tile_sizes(head_dim, group, budget.refresh, query.element_size())
    rows = min(budget.refresh, tokens) * group
    prefill_fwd_kernel[(items, heads, triton.cdiv(rows, tiles["BLOCK_M"]))](
        query, key_cache, value_cache, slots, item_row, item_position, item_query_start,
        item_query_len, units, units if gates is None else gates,
        *(kv_scales or (units, units)), out,
        scale * math.log2(math.e), *budget_arguments(budget, query.device), units.shape[2],
        slots.shape[2], *query.stride()[:3], *key_cache.stride()[1:3], *value_cache.stride()[1:3],
        units.stride(0), units.stride(1), *out.stride()[:3],
        G=group, D=head_dim, UNIT=budget.unit, SOFT=gates is not None,
        FP8=kv_scales is not None,
        **tiles, **OPTIONS,
    )  # fmt: skip


_TYPES = (
    "*{0} *{1} *{1} *i32 *i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *{0} fp32 "
    "i32 i32 i32 i32 i64 i32 i32 i64 i32 i32 i32 i32 i32 i32 i64 i32 i64 i32 i32"
)


def compile_case(
    dtype: str, cache: str, group: int, head_dim: int, unit: int, refresh: int, soft: bool
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``prefill_fwd_kernel``, as ``common/compile_targets.py`` takes it."""
    tiles = tile_sizes(head_dim, group, refresh, 4 if dtype == "fp32" else 2)
    constexprs = {
        "G": group, "D": head_dim, "UNIT": unit, "SOFT": soft, "FP8": cache == "fp8e4nv", **tiles,
    }  # fmt: skip
    types = _TYPES.format(dtype, cache)
    return prefill_fwd_kernel, types, constexprs, OPTIONS


def lists_case(page: int, unit: int) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``lists_fwd_kernel``."""
    constexprs = {"PAGE": page, "UNIT": unit, "BLOCK": LIST_BLOCK}
    types = "*i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 i64 i32 i32 i64 i64 i64 i32"
    return lists_fwd_kernel, types, constexprs, {"num_warps": 4}


ITEMS_CASE: tuple[Any, str, dict[str, Any], dict[str, int]] = (
    items_fwd_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32 i32 i32", {"BLOCK": ITEMS_BLOCK},
    {"num_warps": 4},
)  # fmt: skip
COMPILE_CASES = [
    *(
        compile_case(*case)
        for case in [
            # dtype, of the cache, G, D, unit, R, soft
            ("bf16", "bf16", 4, 128, 1, 64, False),
            ("bf16", "bf16", 4, 128, 16, 128, False),
            ("fp16", "fp16", 7, 80, 1, 1, True),
            ("bf16", "bf16", 3, 256, 128, 64, True),
            ("bf16", "fp8e4nv", 4, 128, 1, 64, False),
            ("fp16", "fp16", 1, 128, 1, 128, False),
        ]
    ),
    *(lists_case(*case) for case in [(16, 1), (16, 16), (0, 1), (0, 16)]),
    of_heads(compile_case("bf16", "bf16", 8, 128, 1, 64, False)),
    of_heads(lists_case(32, 1)),
    ITEMS_CASE,
]
