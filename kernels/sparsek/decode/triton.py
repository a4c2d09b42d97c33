"""Split-KV attention of one query per item over the list it reads, then a reduction."""

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
    load_kept_units,
    of_head,
    positions_of,
    slots_per_block,
    softmax_step,
    token_offsets,
)
from vllm_sparsek.kernels.common.early_launch import begin, launch_early
from vllm_sparsek.kernels.decode.splits import SPLIT_TOKENS, split_sizes

# of decode_fwd_kernel
OPTIONS = {"num_warps": 4, "num_stages": 2}
REDUCE_WARPS = 2


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "splits"])
def decode_fwd_kernel(
    q_ptr,  # [items, Hq, D]
    kv_ptr,  # [num_blocks, H, page, 2 * D]
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    gates_ptr,  # [items, H, K] float32 (SOFT)
    k_scale_ptr,  # one float32 (FP8)
    v_scale_ptr,  # one float32 (FP8)
    acc_ptr,  # [items, Hq, splits, D] float32
    stats_ptr,  # [items, Hq, splits, 2] float32: running maximum and denominator
    scale_log2,  # softmax scale * log2(e)
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    splits,
    per_block,  # tokens of one head from one block of the cache to the next
    stride_q_item,
    stride_q_head,
    stride_kv_head,
    stride_kv_token,
    stride_table_row,
    stride_units_item,
    stride_units_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    SOFT: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One split of the list of one (item, KV head), for all G query heads of that KV head."""
    begin(EARLY)
    i_i, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
    low = i_s * SPLIT
    o_split = low + tl.arange(0, SPLIT)
    i_units = i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    # on their way together: where units are kept, all sinks come before them
    row = tl.load(item_row_ptr + i_i)
    position = tl.load(item_position_ptr + i_i)
    b_unit = load_kept_units(o_split - first_unit * UNIT, max_units, units_ptr + i_units, UNIT)
    if row < 0:
        return
    sinks, kept, window_start, total = list_bounds(
        position, position, first_unit, window, refresh, k, share_bits, max_units, UNIT
    )
    high = tl.minimum(total, low + SPLIT)
    if low >= high:
        return

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    m_q = (o_m < G)[:, None] & m_d[None, :]
    i_q = i_h * G + o_m
    p_q = q_ptr + i_i.to(tl.int64) * stride_q_item
    b_q = tl.load(p_q + i_q[:, None] * stride_q_head + o_d[None, :], mask=m_q, other=0.0)

    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    p_kv = kv_ptr + i_h.to(tl.int64) * stride_kv_head
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    # where the split's tokens lie is found out at once, so that the loop waits for one thing alone,
    # keys and values, which are copied asynchronously
    b_pos, m_split = positions_of(o_split, b_unit, sinks, kept, window_start, high, UNIT)
    b_slots = token_offsets(b_pos, m_split, p_table, per_block, 1, PAGE).to(tl.int32)
    b_slots = tl.where(m_split, b_slots, -1)
    for start in range(0, high - low, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        # a copy that is issued ahead of the last tile looks up a place behind the split
        b_slot = tl.gather(b_slots, o_n % SPLIT, 0)  # [N]
        m_n = b_slot >= 0
        m_kv = m_n[:, None]
        if D < D_PAD:
            m_kv = m_kv & m_d[None, :]
        p_k = p_kv + b_slot.to(tl.int64)[:, None] * stride_kv_token + o_d[None, :]
        b_k = tl.load(p_k, mask=m_kv, other=0.0).to(b_q.dtype)  # [N, D_PAD]
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0).to(b_q.dtype)  # [N, D_PAD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [M, N]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l)
        if SOFT:
            b_gate = list_gates(low + o_n, sinks, kept, gates_ptr + i_units, UNIT)
            b_p = b_p * b_gate[None, :]
        b_acc = b_acc * b_alpha[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if FP8:
        b_acc = b_acc * tl.load(v_scale_ptr)

    i_out = (i_i.to(tl.int64) * tl.num_programs(1) * G + i_q) * splits + i_s
    tl.store(acc_ptr + i_out[:, None] * D + o_d[None, :], b_acc, mask=m_q)
    tl.store(stats_ptr + i_out * 2, b_m, mask=o_m < G)
    tl.store(stats_ptr + i_out * 2 + 1, b_l, mask=o_m < G)


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "split_tokens", "splits"])
def reduce_fwd_kernel(
    acc_ptr,  # [items, Hq, splits, D] float32
    stats_ptr,  # [items, Hq, splits, 2] float32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    out_ptr,  # [items, Hq, D]
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    split_tokens,
    splits,
    stride_out_item,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Combine the splits of one (item, query head)."""
    i_i, i_q = tl.program_id(0), tl.program_id(1)
    k, share_bits = of_head(k, i_q // G), of_head(share_bits, i_q // G)
    if tl.load(item_row_ptr + i_i) < 0:
        return
    # loaded together: what no split of this step wrote is left out below
    position = tl.load(item_position_ptr + i_i)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    o_s = tl.arange(0, SPLITS_PAD)
    m_s = o_s < splits
    i_s = (i_i.to(tl.int64) * tl.num_programs(1) + i_q) * splits + o_s
    b_m = tl.load(stats_ptr + i_s * 2, mask=m_s, other=float("-inf"))
    b_l = tl.load(stats_ptr + i_s * 2 + 1, mask=m_s, other=0.0)
    b_a = tl.load(
        acc_ptr + i_s[:, None] * D + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0
    )
    _, _, _, total = list_bounds(
        position, position, first_unit, window, refresh, k, share_bits, max_units, UNIT
    )
    m_s = o_s * split_tokens < total
    b_m = tl.where(m_s, b_m, float("-inf"))
    b_l = tl.where(m_s, b_l, 0.0)
    b_a = tl.where(m_s[:, None], b_a, 0.0)
    b_max = tl.max(b_m, 0)
    b_weight = tl.exp2(b_m - tl.where(b_max == float("-inf"), 0.0, b_max))
    b_sum = tl.sum(b_weight * b_l, 0)
    b_acc = tl.sum(b_a * b_weight[:, None], 0)
    p_out = out_ptr + i_i.to(tl.int64) * stride_out_item + i_q * stride_out_head + o_d
    tl.store(p_out, (b_acc / b_sum).to(out_ptr.dtype.element_ty), mask=m_d)


def tile_sizes(head_dim: int, group: int, itemsize: int) -> dict[str, int]:
    """Tile choices of ``decode_fwd_kernel`` from shapes alone."""
    d_pad = triton.next_power_of_2(head_dim)
    wide = d_pad * itemsize > 256  # bytes of one key
    return {
        "D_PAD": d_pad,
        "BLOCK_M": max(MIN_BLOCK_M, triton.next_power_of_2(group)),
        "BLOCK_N": 32 if wide else 64,
    }


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
    workspace: tuple[torch.Tensor, torch.Tensor],
    max_tokens: int,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    after: torch.cuda.Event | None = None,
) -> None:
    """See ``reference.decode``.

    Args:
        workspace: acc and stats, contiguous, of ``splits.workspace_shapes``; need no initial value.
        max_tokens: no item's list is longer; it sizes the grid.
        after: see ``api.decode``; the reduction alone waits.
    """
    items, query_heads, head_dim = query.shape
    if items == 0:
        if after is not None:
            after.wait()
        return
    heads, page = kv_cache.shape[1], kv_cache.shape[2]
    group = query_heads // heads
    per_block = slots_per_block(kv_cache)
    if per_block is None:
        raise ValueError(
            f"kv_cache: the stride of blocks must be a multiple of that of tokens, got strides "
            f"{kv_cache.stride()}"
        )
    splits, split_tokens = split_sizes(max_tokens)
    acc, stats = workspace
    scalars = (*budget_arguments(budget, query.device), units.shape[2])
    tiles = tile_sizes(head_dim, group, query.element_size())
    decode_fwd_kernel[(items, heads, splits)](
        query, kv_cache, block_table, item_row, item_position,
        units, units if gates is None else gates, *(kv_scales or (units, units)), acc, stats,
        scale * math.log2(math.e), *scalars, splits, per_block,
        query.stride(0), query.stride(1), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), units.stride(0), units.stride(1),
        G=group, D=head_dim, PAGE=page, UNIT=budget.unit, SOFT=gates is not None,
        FP8=kv_scales is not None, SPLIT=split_tokens,
        **tiles, **OPTIONS, **launch_early(query.device),
    )  # fmt: skip
    if after is not None:
        after.wait()
    reduce_fwd_kernel[(items, query_heads)](
        acc, stats, item_row, item_position, out, *scalars, split_tokens, splits,
        out.stride(0), out.stride(1),
        G=group, D=head_dim, D_PAD=tiles["D_PAD"], UNIT=budget.unit,
        SPLITS_PAD=triton.next_power_of_2(splits), num_warps=REDUCE_WARPS,
    )  # fmt: skip


def compile_case(
    dtype: str, cache: str, group: int, head_dim: int, page: int, unit: int, soft: bool
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``decode_fwd_kernel``, as ``common/compile_targets.py`` takes it."""
    constexprs = {
        "G": group, "D": head_dim, "PAGE": page, "UNIT": unit, "SOFT": soft,
        "FP8": cache == "fp8e4nv", "SPLIT": SPLIT_TOKENS, **tile_sizes(head_dim, group, 2),
        "EARLY": False,
    }  # fmt: skip
    types = (
        f"*{dtype} *{cache} *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *fp32 *fp32 fp32 "
        "i32 i32 i32 i32 i64 i32 i32 i64 i32 i32 i32 i32 i32 i32 i32"
    )
    return decode_fwd_kernel, types, constexprs, OPTIONS


def reduce_case(
    group: int, head_dim: int, head_dim_pad: int
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``reduce_fwd_kernel``."""
    constexprs = {"G": group, "D": head_dim, "D_PAD": head_dim_pad, "UNIT": 1, "SPLITS_PAD": 16}
    types = "*fp32 *fp32 *i32 *i32 *bf16 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32"
    return reduce_fwd_kernel, types, constexprs, {"num_warps": REDUCE_WARPS}


COMPILE_CASES = [
    *(
        compile_case(*case)
        for case in [
            ("bf16", "bf16", 4, 128, 16, 1, False),
            ("bf16", "bf16", 4, 128, 16, 16, False),
            ("fp16", "fp16", 7, 80, 32, 1, True),
            ("bf16", "bf16", 3, 256, 128, 128, True),
            ("bf16", "fp8e4nv", 4, 128, 16, 1, False),
        ]
    ),
    of_heads(compile_case("bf16", "bf16", 4, 128, 32, 1, False)),
    reduce_case(7, 80, 128),
    of_heads(reduce_case(4, 128, 128)),
]
