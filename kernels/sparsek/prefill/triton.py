"""Attention of the queries of one refresh block over the list that they share."""

from __future__ import annotations

import math

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
    softmax_step,
    token_offsets,
)

MAX_BLOCK_M = 128


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def prefill_fwd_kernel(
    q_ptr,  # [T, Hq, D]
    kv_ptr,  # [num_blocks, H, page, 2 * D]
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32, position of the first query
    item_query_start_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    gates_ptr,  # [items, H, K] float32 (SOFT)
    k_scale_ptr,  # one float32 (FP8)
    v_scale_ptr,  # one float32 (FP8)
    out_ptr,  # [T, Hq, D]
    scale_log2,  # softmax scale * log2(e)
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    stride_q_token,
    stride_q_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_row,
    stride_units_item,
    stride_units_head,
    stride_out_token,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    SOFT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M (query, head) pairs of one (item, KV head); the heads of a query lie together."""
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
    i_q = i_h * G + o_m % G
    i_t = tl.load(item_query_start_ptr + i_i).to(tl.int64) + o_query
    p_q = q_ptr + (i_t * stride_q_token + i_q * stride_q_head)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [M, D_PAD]

    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    p_kv = kv_ptr + i_h.to(tl.int64) * stride_kv_head
    i_units = i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(0, total, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_pos, m_n, i_slot, m_kept = list_positions(
            o_n, sinks, kept, window_start, total, units_ptr + i_units, UNIT
        )
        o_kv = token_offsets(o_pos, m_n, p_table, stride_kv_block, stride_kv_token, PAGE)
        p_k = p_kv + o_kv[:, None] + o_d[None, :]
        m_kv = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k, mask=m_kv, other=0.0).to(b_q.dtype)  # [N, D_PAD]
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0).to(b_q.dtype)  # [N, D_PAD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        m_s = m_n[None, :] & (o_pos[None, :] <= (position + o_query)[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l)
        if SOFT:
            # gates weigh values only: the denominator is that of plain softmax
            b_gate = tl.load(gates_ptr + i_units + i_slot, mask=m_kept, other=1.0)
            b_p = b_p * b_gate[None, :]
        b_acc = b_acc * b_alpha[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if FP8:
        b_acc = b_acc * tl.load(v_scale_ptr)

    p_out = out_ptr + (i_t * stride_out_token + i_q * stride_out_head)[:, None] + o_d[None, :]
    tl.store(p_out, (b_acc / b_l[:, None]).to(out_ptr.dtype.element_ty), mask=m_q)


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


def warps(block_m: int) -> int:
    """Warps of ``prefill_fwd_kernel``."""
    return 8 if block_m > 64 else 4


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
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
    query_heads, head_dim = query.shape[1:]
    heads, page = kv_cache.shape[1], kv_cache.shape[2]
    group = query_heads // heads
    # no item can have more queries than the batch has tokens
    tiles = tile_sizes(head_dim, group, budget.refresh, query.element_size())
    rows = min(budget.refresh, query.shape[0]) * group
    prefill_fwd_kernel[(items, heads, triton.cdiv(rows, tiles["BLOCK_M"]))](
        query, kv_cache, block_table, item_row, item_position, item_query_start,
        item_query_len, units, units if gates is None else gates,
        *(kv_scales or (units, units)), out,
        scale * math.log2(math.e), *budget_arguments(budget), units.shape[2],
        query.stride(0), query.stride(1),
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), units.stride(0), units.stride(1),
        out.stride(0), out.stride(1),
        G=group, D=head_dim, PAGE=page, UNIT=budget.unit, SOFT=gates is not None,
        FP8=kv_scales is not None,
        **tiles, num_warps=warps(tiles["BLOCK_M"]), num_stages=2,
    )  # fmt: skip


_CASES = [
    # dtype, of the cache, G, D, page, unit, R, soft
    ("bf16", "bf16", 4, 128, 16, 1, 64, False),
    ("bf16", "bf16", 4, 128, 16, 16, 128, False),
    ("fp16", "fp16", 7, 80, 32, 1, 1, True),
    ("bf16", "bf16", 3, 256, 128, 128, 64, True),
    ("bf16", "fp8e4nv", 4, 128, 16, 1, 64, False),
]
# (kernel, argument types, constexprs, options); see common/compile_targets.py
COMPILE_CASES = [
    (
        prefill_fwd_kernel,
        f"*{dtype} *{cache} *i32 *i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *{dtype} fp32 "
        "i32 i32 i32 i32 i64 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32 i32",
        {
            "G": group,
            "D": head_dim,
            "PAGE": page,
            "UNIT": unit,
            "SOFT": soft,
            "FP8": cache == "fp8e4nv",
            **tiles,
        },
        {"num_warps": warps(tiles["BLOCK_M"]), "num_stages": 2},
    )
    for dtype, cache, group, head_dim, page, unit, refresh, soft in _CASES
    for tiles in [tile_sizes(head_dim, group, refresh, 2)]
]
