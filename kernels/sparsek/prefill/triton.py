"""Attention of the queries of one refresh block over the list that they share."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    MIN_BLOCK_M,
    budget_arguments,
    list_bounds,
    list_positions,
    page_argument,
    softmax_step,
    token_offsets,
)

MAX_BLOCK_M = 128
ITEMS_BLOCK = 256  # items per program of ``items_fwd_kernel``


@triton.jit
def place_positions(o_n, sinks, kept, window_start, total, p_units, UNIT: tl.constexpr):
    """Token positions [N] at places ``o_n`` of the list, -1 where there is none."""
    o_pos, m_n, _, _ = list_positions(o_n, sinks, kept, window_start, total, p_units, UNIT)
    return tl.where(m_n, o_pos, -1)


@triton.jit
def place_offsets(b_pos, p_table, stride_block, stride_token, PAGE: tl.constexpr):
    """Offsets [N] int64 in a paged cache of tokens at ``b_pos``, -1 where that is negative."""
    m_n = b_pos >= 0
    b_offset = token_offsets(b_pos, m_n, p_table, stride_block, stride_token, PAGE)
    return tl.where(m_n, b_offset, -1)


@triton.jit
def place_gates(o_n, sinks, kept, p_gates, UNIT: tl.constexpr):
    """Gates [N] of the places ``o_n``; they weigh values only, not the denominator."""
    o_kept = o_n - sinks
    m_kept = (o_kept >= 0) & (o_kept < kept * UNIT)
    return tl.load(p_gates + o_kept // UNIT, mask=m_kept, other=1.0)


@triton.jit
def load_rows(p_cache, b_offset, o_d, dtype: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Keys or values [N, D_PAD] of the tokens at ``b_offset``, 0 where that is negative.

    They are of ``dtype``, which holds every number of an fp8 cache.
    """
    m_c = (b_offset >= 0)[:, None]
    if D < D_PAD:
        m_c = m_c & (o_d < D)[None, :]
    return tl.load(p_cache + b_offset[:, None] + o_d[None, :], mask=m_c, other=0.0).to(dtype)


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def prefill_fwd_kernel(
    q_ptr,  # [rows, T, Hq, D]
    k_ptr,  # [num_blocks, H, page, D]
    v_ptr,  # [num_blocks, H, page, D]
    block_table_ptr,  # [rows, max_blocks] int32
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
    stride_q_row,
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table_row,
    stride_units_item,
    stride_units_head,
    stride_out_row,
    stride_out_token,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    SOFT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M (query, head) pairs of one (item, KV head); the heads of a query lie together.

    SAME_STRIDES: values lie as keys do, so that one offset serves both.
    """
    i_i, i_h, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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

    p_table = block_table_ptr + i_row * stride_table_row
    p_k = k_ptr + i_h.to(tl.int64) * stride_k_head
    p_v = v_ptr + i_h.to(tl.int64) * stride_v_head
    i_units = i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr)
    p_units = units_ptr + i_units
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    # where a tile's tokens lie is found out two steps ahead, so that only keys and values, which
    # are copied asynchronously, are waited for
    o_b = tl.arange(0, BLOCK_N)
    b_pos = place_positions(o_b, sinks, kept, window_start, total, p_units, UNIT)
    b_offset = place_offsets(b_pos, p_table, stride_k_block, stride_k_token, PAGE)
    if not SAME_STRIDES:
        b_v_offset = place_offsets(b_pos, p_table, stride_v_block, stride_v_token, PAGE)
    b_pos = place_positions(o_b + BLOCK_N, sinks, kept, window_start, total, p_units, UNIT)
    # all queries see the kept units, which end before the window; a short prompt's may not see
    # all sinks
    plain = tl.where(position >= sinks, (sinks + kept * UNIT) // BLOCK_N * BLOCK_N, 0)
    for start in range(0, plain, BLOCK_N):
        b_k = load_rows(p_k, b_offset, o_d, b_q.dtype, D, D_PAD)
        if SAME_STRIDES:
            b_v = load_rows(p_v, b_offset, o_d, b_q.dtype, D, D_PAD)
        else:
            b_v = load_rows(p_v, b_v_offset, o_d, b_q.dtype, D, D_PAD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        b_s += tl.where(b_offset >= 0, 0.0, float("-inf"))[None, :]
        b_offset = place_offsets(b_pos, p_table, stride_k_block, stride_k_token, PAGE)
        if not SAME_STRIDES:
            b_v_offset = place_offsets(b_pos, p_table, stride_v_block, stride_v_token, PAGE)
        b_pos = place_positions(
            start + 2 * BLOCK_N + o_b, sinks, kept, window_start, total, p_units, UNIT
        )
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l)
        if SOFT:
            b_p *= place_gates(start + o_b, sinks, kept, gates_ptr + i_units, UNIT)[None, :]
        b_acc = b_acc * b_alpha[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    for start in range(plain, total, BLOCK_N):
        b_k = load_rows(p_k, b_offset, o_d, b_q.dtype, D, D_PAD)
        if SAME_STRIDES:
            b_v = load_rows(p_v, b_offset, o_d, b_q.dtype, D, D_PAD)
        else:
            b_v = load_rows(p_v, b_v_offset, o_d, b_q.dtype, D, D_PAD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        # places of kept units count as position 0
        o_n = start + o_b
        o_pos = tl.where(o_n < sinks, o_n, window_start + o_n - sinks - kept * UNIT)
        o_pos = tl.where((o_n >= sinks) & (o_n < sinks + kept * UNIT), 0, o_pos)
        m_s = (b_offset >= 0)[None, :] & (o_pos[None, :] <= (position + o_query)[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_offset = place_offsets(b_pos, p_table, stride_k_block, stride_k_token, PAGE)
        if not SAME_STRIDES:
            b_v_offset = place_offsets(b_pos, p_table, stride_v_block, stride_v_token, PAGE)
        b_pos = place_positions(
            start + 2 * BLOCK_N + o_b, sinks, kept, window_start, total, p_units, UNIT
        )
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l)
        if SOFT:
            b_p *= place_gates(start + o_b, sinks, kept, gates_ptr + i_units, UNIT)[None, :]
        b_acc = b_acc * b_alpha[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
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
        "BLOCK_M": min(MAX_BLOCK_M // 2 if wide else MAX_BLOCK_M, max(MIN_BLOCK_M, rows)),
        "BLOCK_N": 32 if wide else 64,
    }


def options(block_m: int) -> dict[str, int]:
    """Warps and pipeline stages of ``prefill_fwd_kernel``."""
    return {"num_warps": 8 if block_m > 64 else 4, "num_stages": 2}


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
    # no item can have more queries than the batch has tokens
    tiles = tile_sizes(head_dim, group, budget.refresh, query.element_size())
    rows = min(budget.refresh, tokens) * group
    prefill_fwd_kernel[(items, heads, triton.cdiv(rows, tiles["BLOCK_M"]))](
        query, key_cache, value_cache, block_table, item_row, item_position, item_query_start,
        item_query_len, units, units if gates is None else gates,
        *(kv_scales or (units, units)), out,
        scale * math.log2(math.e), *budget_arguments(budget), units.shape[2],
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        block_table.stride(0), units.stride(0), units.stride(1), *out.stride()[:3],
        G=group, D=head_dim, PAGE=page_argument(page, block_table.shape[1]), UNIT=budget.unit,
        SAME_STRIDES=key_cache.stride() == value_cache.stride(), SOFT=gates is not None,
        FP8=kv_scales is not None,
        **tiles, **options(tiles["BLOCK_M"]),
    )  # fmt: skip


_TYPES = (
    "*{0} *{1} *{1} *i32 *i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *{0} fp32 "
    "i32 i32 i32 i32 i64 i32 i64 i32 i32 i64 i32 i32 i64 i32 i32 i32 i32 i32 i64 i32 i32"
)


def compile_case(
    dtype: str,
    cache: str,
    group: int,
    head_dim: int,
    page: int,
    unit: int,
    refresh: int,
    soft: bool,
    same_strides: bool = True,
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``prefill_fwd_kernel``, as ``common/compile_targets.py`` takes it."""
    tiles = tile_sizes(head_dim, group, refresh, 4 if dtype == "fp32" else 2)
    constexprs = {
        "G": group, "D": head_dim, "PAGE": page, "UNIT": unit, "SAME_STRIDES": same_strides,
        "SOFT": soft, "FP8": cache == "fp8e4nv", **tiles,
    }  # fmt: skip
    types = _TYPES.format(dtype, cache)
    return prefill_fwd_kernel, types, constexprs, options(tiles["BLOCK_M"])


ITEMS_CASE: tuple[Any, str, dict[str, Any], dict[str, int]] = (
    items_fwd_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32 i32 i32", {"BLOCK": ITEMS_BLOCK},
    {"num_warps": 4},
)  # fmt: skip
COMPILE_CASES = [
    *(
        compile_case(*case)
        for case in [
            # dtype, of the cache, G, D, page, unit, R, soft
            ("bf16", "bf16", 4, 128, 16, 1, 64, False),
            ("bf16", "bf16", 4, 128, 16, 16, 128, False),
            ("fp16", "fp16", 7, 80, 32, 1, 1, True),
            ("bf16", "bf16", 3, 256, 128, 128, 64, True),
            ("bf16", "fp8e4nv", 4, 128, 16, 1, 64, False),
            ("fp16", "fp16", 1, 128, 0, 1, 128, False),
            ("fp16", "fp16", 1, 128, 0, 16, 64, False, False),
        ]
    ),
    ITEMS_CASE,
]
