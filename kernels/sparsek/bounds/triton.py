"""Triton kernels of query-aware selection: bounds of keys, and their products with a query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    MIN_BLOCK_M,
    budget_arguments,
    end_unit,
    units_kept,
)
from vllm_sparsek.kernels.select.triton import select_scored

WRITE_TILE = 1024  # elements of a unit's keys per warp: 32 registers a thread
SCORE_BYTES = 16 * 1024  # of minima, and again of maxima, per program


def write_warps(unit_pad: int, head_dim_pad: int) -> int:
    """Warps that hold one unit's keys in registers."""
    return min(16, max(1, unit_pad * head_dim_pad // WRITE_TILE))


@triton.jit
def write_bounds_fwd_kernel(
    kv_ptr,  # [num_blocks, H, page, 2 * D]
    slot_mapping_ptr,  # [T] int64
    bounds_ptr,  # [num_blocks, H, page // unit, 2, D]
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_bounds_block,
    stride_bounds_head,
    stride_bounds_unit,
    stride_bounds_side,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_PAD: tl.constexpr,
):
    """Bounds of the unit that one (new token, KV head) completes, if it completes one."""
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + i_t).to(tl.int64)
    if (slot < 0) | (slot % UNIT != UNIT - 1):
        return
    o_t = tl.arange(0, UNIT_PAD)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    m_k = (o_t < UNIT)[:, None] & m_d[None, :]
    block, inside = slot // PAGE, slot % PAGE // UNIT
    p_k = kv_ptr + block * stride_kv_block + i_h.to(tl.int64) * stride_kv_head
    o_token = inside * UNIT + o_t
    p_k += o_token[:, None] * stride_kv_token + o_d[None, :]
    b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)  # [UNIT_PAD, D_PAD]
    b_low = tl.min(tl.where(m_k, b_k, float("inf")), 0)  # [D_PAD]
    b_high = tl.max(tl.where(m_k, b_k, float("-inf")), 0)
    p_out = bounds_ptr + block * stride_bounds_block + i_h.to(tl.int64) * stride_bounds_head
    p_out += inside * stride_bounds_unit + o_d
    # the values are keys: converting back is exact
    tl.store(p_out, b_low.to(bounds_ptr.dtype.element_ty), mask=m_d)
    tl.store(p_out + stride_bounds_side, b_high.to(bounds_ptr.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def score_units_fwd_kernel(
    q_ptr,  # [items, Hq, D]
    bounds_ptr,  # [num_blocks, H, page // unit, 2, D]
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    out_ptr,  # [items, H, U] float32
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    stride_q_item,
    stride_q_head,
    stride_bounds_block,
    stride_bounds_head,
    stride_bounds_unit,
    stride_bounds_side,
    stride_table_row,
    stride_out_item,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr,  # units of a KV block
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Upper bounds of BLOCK units that compete for one (item, KV head)."""
    i_i, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(item_row_ptr + i_i)
    if row < 0:
        return
    start_position = tl.load(item_position_ptr + i_i) // refresh * refresh
    end = end_unit(start_position, first_unit, window, UNIT)
    keep = tl.minimum(units_kept(start_position, k, share_bits, UNIT), max_units)
    first = first_unit + i_b * BLOCK
    # where all units fit nobody asks for scores
    if (first >= end) | (keep >= end - first_unit):
        return

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    p_q = q_ptr + i_i.to(tl.int64) * stride_q_item + (i_h * G + o_m)[:, None] * stride_q_head
    b_q = tl.load(p_q + o_d[None, :], mask=(o_m < G)[:, None] & m_d[None, :], other=0.0)
    b_zero = tl.zeros_like(b_q)

    o_u = first + tl.arange(0, BLOCK)
    m_u = o_u < end
    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    b_block = tl.load(p_table + o_u // PER_BLOCK, mask=m_u, other=0).to(tl.int64)
    o_unit = b_block * stride_bounds_block + o_u % PER_BLOCK * stride_bounds_unit
    p_low = bounds_ptr + i_h.to(tl.int64) * stride_bounds_head + o_unit[:, None] + o_d[None, :]
    m_bounds = m_u[:, None] & m_d[None, :]
    b_low = tl.load(p_low, mask=m_bounds, other=0.0).to(b_q.dtype)  # [BLOCK, D_PAD]
    b_high = tl.load(p_low + stride_bounds_side, mask=m_bounds, other=0.0).to(b_q.dtype)
    b_negative = tl.where(b_q < b_zero, b_q, b_zero)
    b_positive = tl.where(b_q > b_zero, b_q, b_zero)
    b_z = tl.dot(b_negative, tl.trans(b_low), input_precision="ieee")  # [M, BLOCK]
    b_z += tl.dot(b_positive, tl.trans(b_high), input_precision="ieee")
    b_z = tl.max(tl.where((o_m < G)[:, None], b_z, float("-inf")), 0)
    p_out = out_ptr + i_i.to(tl.int64) * stride_out_item + i_h.to(tl.int64) * stride_out_head
    tl.store(p_out + o_u, b_z, mask=m_u)


def write_bounds(kv_cache: torch.Tensor, slot_mapping: torch.Tensor, bounds: torch.Tensor) -> None:
    """See ``reference.write_bounds``."""
    _, heads, page, width = kv_cache.shape
    tokens, unit = slot_mapping.shape[0], page // bounds.shape[2]
    if tokens == 0:
        return
    unit_pad, d_pad = triton.next_power_of_2(unit), triton.next_power_of_2(width // 2)
    write_bounds_fwd_kernel[(tokens, heads)](
        kv_cache, slot_mapping, bounds,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), *bounds.stride()[:4],
        D=width // 2, D_PAD=d_pad, PAGE=page, UNIT=unit, UNIT_PAD=unit_pad,
        num_warps=write_warps(unit_pad, d_pad),
    )  # fmt: skip


def tile_sizes(head_dim: int, group: int, itemsize: int) -> dict[str, int]:
    """Tile choices of ``score_units_fwd_kernel`` from shapes alone."""
    d_pad = triton.next_power_of_2(head_dim)
    return {
        "D_PAD": d_pad,
        "BLOCK_M": max(MIN_BLOCK_M, triton.next_power_of_2(group)),
        "BLOCK": max(16, min(128, SCORE_BYTES // (d_pad * itemsize))),
    }


def select_by_query(
    query: torch.Tensor,
    bounds: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    units_out: torch.Tensor,
    unit_scores: torch.Tensor,
) -> None:
    """See ``reference.select_by_query``; every element of ``units_out`` is written.

    Args:
        unit_scores: [items, H, U] float32 scratch; needs no initial value.
    """
    items, query_heads, head_dim = query.shape
    heads, per_block = bounds.shape[1:3]
    if items == 0:
        return
    group = query_heads // heads
    tiles = tile_sizes(head_dim, group, query.element_size())
    score_units_fwd_kernel[(items, heads, triton.cdiv(unit_scores.shape[2], tiles["BLOCK"]))](
        query, bounds, block_table, item_row, item_position, unit_scores,
        *budget_arguments(budget, query.device), units_out.shape[2],
        query.stride(0), query.stride(1), *bounds.stride()[:4], block_table.stride(0),
        unit_scores.stride(0), unit_scores.stride(1),
        G=group, D=head_dim, PER_BLOCK=per_block, UNIT=budget.unit, **tiles, num_warps=4,
    )  # fmt: skip
    select_scored(unit_scores, item_row, item_position, budget, units_out)


# (kernel, argument types, constexprs, options); see common/compile_targets.py
COMPILE_CASES = [
    *(
        (
            write_bounds_fwd_kernel,
            f"*{dtype} *i64 *{dtype} i64 i32 i32 i64 i32 i32 i32",
            {"D": d, "D_PAD": d_pad, "PAGE": page, "UNIT": unit, "UNIT_PAD": unit_pad},
            {"num_warps": write_warps(unit_pad, d_pad)},
        )
        for dtype, d, d_pad, page, unit, unit_pad in [
            ("bf16", 128, 128, 16, 16, 16),
            ("fp16", 80, 128, 48, 48, 64),
            ("bf16", 256, 256, 128, 128, 128),
            ("fp8e4nv", 128, 128, 16, 16, 16),
        ]
    ),
    *(
        (
            score_units_fwd_kernel,
            f"*{dtype} *{of_bounds} *i32 *i32 *i32 *fp32 i32 i32 i32 i32 i64 i32 "
            "i32 i32 i64 i32 i32 i32 i32 i64 i32",
            {
                "G": group,
                "D": head_dim,
                "PER_BLOCK": per_block,
                "UNIT": unit,
                **tile_sizes(head_dim, group, 2),
            },
            {"num_warps": 4},
        )
        for dtype, of_bounds, group, head_dim, per_block, unit in [
            ("bf16", "bf16", 4, 128, 1, 16),
            ("fp16", "fp16", 7, 80, 8, 16),
            ("bf16", "bf16", 3, 256, 1, 128),
            ("bf16", "fp8e4nv", 4, 128, 2, 16),
        ]
    ),
]
