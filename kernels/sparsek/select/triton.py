"""Exact top-k of static scores in one launch: radix select, then one ordered compaction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    budget_arguments,
    end_unit,
    units_kept,
)
from vllm_sparsek.kernels.select.memo import SelectionMemo

TOKEN_BLOCK = 2048  # token scores per step
TOKEN_WARPS = 8
# pages per step; at least one per thread, since every page score lives in one thread
PAGE_BLOCK = 128
PAGE_WARPS = 4
POOL_CHUNK = tl.constexpr(16)  # tokens of every page that are loaded at once
# the threshold search takes a handful of Newton steps; scores that make it jump to and fro are
# bisected after that, which needs about 24 steps more
NEWTON_STEPS = tl.constexpr(12)
SOFT_STEPS = tl.constexpr(48)
SOFT_TOLERANCE = tl.constexpr(1e-7)  # of tau


@triton.jit
def load_unit_scores(
    o_u,  # [BLOCK] units
    m_u,  # [BLOCK]
    p_scores,  # one head of the score cache
    p_table,  # [max_blocks] int32
    stride_block,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [BLOCK] of units, -inf where masked; -0.0 is made 0.0: the two are equal.

    POOLING "none": ``p_scores`` are scores of units, in the order of the context.
    """
    if POOLING == "none":
        b_z = tl.load(p_scores + o_u, mask=m_u, other=float("-inf"))
    elif UNIT == 1:
        b_block = tl.load(p_table + o_u // PAGE, mask=m_u, other=0).to(tl.int64)
        b_z = tl.load(p_scores + b_block * stride_block + o_u % PAGE, mask=m_u, other=float("-inf"))
    else:
        b_block = tl.load(p_table + o_u, mask=m_u, other=0).to(tl.int64)
        o_c = tl.arange(0, POOL_CHUNK)
        p_page = p_scores + b_block[:, None] * stride_block + o_c[None, :]
        # chunks are combined element by element and reduced once, after the loop: a reduction
        # inside trips an assertion of Triton 3.6 (OptimizeThreadLocality)
        if POOLING == "mean":
            b_sum = tl.zeros([BLOCK, POOL_CHUNK], tl.float32)
            for c in range(0, UNIT, POOL_CHUNK):
                m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
                b_sum += tl.load(p_page + c, mask=m_c, other=0.0)  # [BLOCK, CHUNK]
            b_z = tl.where(m_u, tl.sum(b_sum, 1) / UNIT, float("-inf"))
        else:
            b_high = tl.full([BLOCK, POOL_CHUNK], float("-inf"), tl.float32)
            for c in range(0, UNIT, POOL_CHUNK):
                m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
                b_high = tl.maximum(b_high, tl.load(p_page + c, mask=m_c, other=float("-inf")))
            b_z = tl.max(b_high, 1)
            if POOLING == "lse":
                b_shift = tl.where(b_z == float("-inf"), 0.0, b_z)
                b_sum = tl.zeros([BLOCK, POOL_CHUNK], tl.float32)
                for c in range(0, UNIT, POOL_CHUNK):
                    m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
                    b_c = tl.load(p_page + c, mask=m_c, other=float("-inf"))
                    b_sum += tl.exp(b_c - b_shift[:, None])
                # the highest token alone contributes 1
                b_log = tl.log(tl.maximum(tl.sum(b_sum, 1), 1.0))
                b_z = tl.where(b_z == float("-inf"), b_z, b_shift + b_log)
    return tl.where(b_z == 0.0, 0.0, b_z)


@triton.jit
def candidate_units(o_c, candidates, listed, fresh, p_units, MEMO: tl.constexpr):
    """Units [BLOCK] of candidates ``o_c``, ascending, and which of them exist [BLOCK]."""
    o_u = fresh + o_c - listed
    if MEMO:
        o_u = tl.where(o_c < listed, tl.load(p_units + o_c, mask=o_c < listed, other=0), o_u)
    return o_u, o_c < candidates


@triton.jit
def ordered_key(b_z):
    """float32 to uint32 of the same order."""
    b_bits = b_z.to(tl.int32, bitcast=True)
    b_bits = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    # flips the sign bit
    return (b_bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def key_value(b_key):
    """The float32 whose ``ordered_key`` is ``b_key``."""
    b_bits = b_key.to(tl.int32, bitcast=True) ^ -0x80000000
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def soft_threshold(
    b_top,  # the kept unit with the lowest score has this score
    keep,
    first,
    end,
    p_scores,
    p_table,
    stride_block,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tau - b_top, where sum(clip(score - tau, 0, 1)) == keep; it lies in [-1, 0].

    Newton's method kept inside a bracket. Everything is relative to ``b_top`` so that sums
    stay small numbers; units at the cap of 1 are counted, not summed.
    """
    o_b = tl.arange(0, BLOCK)
    b_low = tl.full([], -1.0, tl.float32)
    b_high = tl.full([], 0.0, tl.float32)
    b_tau = tl.full([], -1.0, tl.float32)
    b_change = tl.full([], 1.0, tl.float32)
    i_step = tl.full([], 0, tl.int32)
    while (b_change > SOFT_TOLERANCE) & (i_step < SOFT_STEPS):
        b_capped = tl.zeros([BLOCK], tl.int32)
        b_inside = tl.zeros([BLOCK], tl.int32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(first, end, BLOCK):
            o_u = start + o_b
            b_z = load_unit_scores(
                o_u, o_u < end, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK
            )
            b_d = b_z - b_top
            m_capped = b_d - b_tau >= 1.0
            m_inside = (b_d > b_tau) & (b_d - b_tau < 1.0)
            b_capped += m_capped.to(tl.int32)
            b_inside += m_inside.to(tl.int32)
            b_sum += tl.where(m_inside, b_d, 0.0)
        n_inside = tl.sum(b_inside, 0)
        # mass(tau) - keep = missing - n_inside * tau on this linear piece
        b_missing = tl.sum(b_sum, 0) + (tl.sum(b_capped, 0) - keep).to(tl.float32)
        b_excess = b_missing - n_inside.to(tl.float32) * b_tau
        b_low = tl.where(b_excess > 0.0, b_tau, b_low)
        b_high = tl.where(b_excess > 0.0, b_high, b_tau)
        b_newton = b_missing / tl.maximum(n_inside, 1).to(tl.float32)
        m_inner = (n_inside > 0) & (b_newton > b_low) & (b_newton < b_high)
        b_next = tl.where(m_inner & (i_step < NEWTON_STEPS), b_newton, 0.5 * (b_low + b_high))
        # at the root Newton stands still and only rounding decides on which side of the bracket
        m_root = (n_inside > 0) & (tl.abs(b_newton - b_tau) <= SOFT_TOLERANCE)
        b_next = tl.where(m_root | (b_excess == 0.0), b_tau, b_next)
        b_change = tl.abs(b_next - b_tau)
        b_tau = b_next
        i_step += 1
    return b_tau


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def select_fwd_kernel(
    scores_ptr,  # [num_blocks, H, page] float32; [items, H, U] if POOLING is "none"
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    gates_ptr,  # [items, H, K] float32 (SOFT)
    stamps_ptr,  # [items, H, 4] int32 (MEMO)
    step_ptr,  # [1] int32 (MEMO)
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    stride_score_block,
    stride_score_head,
    stride_table_row,
    stride_out_item,
    stride_out_head,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    SOFT: tl.constexpr,
    MEMO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Kept units, ascending, of one (item, KV head).

    Every element of the output is written, except under MEMO where the selection of the step
    before still stands or the item is padding. Where it was made in an earlier refresh block, only
    its units and those that left the window since are candidates.
    """
    i_i, i_h = tl.program_id(0), tl.program_id(1)
    o_b = tl.arange(0, BLOCK)
    o_bin = tl.arange(0, 256)
    i_out = i_i.to(tl.int64) * stride_out_item + i_h * stride_out_head
    p_units = units_ptr + i_out
    p_gates = gates_ptr + i_out

    row = tl.load(item_row_ptr + i_i)
    position = tl.load(item_position_ptr + i_i)
    start_position = position // refresh * refresh
    end = end_unit(start_position, first_unit, window, UNIT)
    keep = tl.minimum(units_kept(start_position, k, share_bits, UNIT), max_units)
    end = tl.where(row < 0, first_unit, end)
    keep = tl.minimum(keep, end - first_unit)

    p_table = block_table_ptr + tl.maximum(row, 0).to(tl.int64) * stride_table_row
    p_scores = scores_ptr + i_h.to(tl.int64) * stride_score_head
    if POOLING == "none":
        p_scores += i_i.to(tl.int64) * stride_score_block

    # candidate c is unit c - listed + fresh, or, below ``listed``, the c-th unit of the list kept
    listed = keep * 0
    fresh = keep * 0 + first_unit
    if MEMO:
        p_stamp = stamps_ptr + (i_i * tl.num_programs(1) + i_h) * 4
        step = tl.load(step_ptr)
        b_stamp = tl.load(p_stamp)
        kept_end = end_unit(b_stamp, first_unit, window, UNIT)
        kept_units = tl.minimum(units_kept(b_stamp, k, share_bits, UNIT), max_units)
        kept_units = tl.minimum(kept_units, kept_end - first_unit)
        first_block = tl.load(p_table)
        last_block = tl.load(p_table + tl.maximum(end * UNIT - 1, 0) // PAGE)
        kept_last_block = tl.load(p_table + tl.maximum(kept_end * UNIT - 1, 0) // PAGE)
        same_request = (
            (b_stamp >= 0)
            & (b_stamp <= start_position)
            & (tl.load(p_stamp + 1) == first_block)
            & (tl.load(p_stamp + 2) == kept_last_block)
            & (tl.load(p_stamp + 3) == step - 1)
        )
        # all threads have read the stamp before one of them writes it
        tl.debug_barrier()
        tl.store(p_stamp, start_position)
        tl.store(p_stamp + 1, first_block)
        tl.store(p_stamp + 2, last_block)
        tl.store(p_stamp + 3, tl.where(row < 0, -2, step))
        if (same_request & (b_stamp == start_position)) | (row < 0):
            return
        # a unit that was not among the best will not be: only what left the window is new, unless
        # the list grows. Gates depend on units that are not in the list
        if same_request & (keep <= kept_units) & (not SOFT):
            listed = kept_units
            fresh = kept_end
    candidates = end - fresh + listed

    if keep == end - first_unit:
        for start in range(0, keep, BLOCK):
            o_slot = start + o_b
            tl.store(p_units + o_slot, first_unit + o_slot, mask=o_slot < keep)
            if SOFT:
                tl.store(p_gates + o_slot, tl.full([BLOCK], 1.0, tl.float32), mask=o_slot < keep)
        written = keep
    else:
        # radix select: after every pass ``prefix`` holds one more byte of the keep-th largest key
        prefix = tl.full([], 0, tl.uint32)
        known = tl.full([], 0, tl.uint32)
        need = keep
        shift = tl.full([], 24, tl.uint32)
        for _ in range(4):
            b_count = tl.zeros([256], tl.int32)
            for start in range(0, candidates, BLOCK):
                o_u, m_u = candidate_units(start + o_b, candidates, listed, fresh, p_units, MEMO)
                b_z = load_unit_scores(
                    o_u, m_u, p_scores, p_table, stride_score_block, PAGE, UNIT, POOLING, BLOCK
                )
                b_key = ordered_key(b_z)
                b_digit = ((b_key >> shift) & 0xFF).to(tl.int32)
                b_count += tl.histogram(b_digit, 256, mask=m_u & ((b_key & known) == prefix))
            b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)  # [256] keys in higher bins
            m_bin = (b_above < need) & (b_above + b_count >= need)
            digit = tl.sum(tl.where(m_bin, o_bin, 0), 0)
            need -= tl.sum(tl.where(m_bin, b_above, 0), 0)
            prefix = prefix | (digit.to(tl.uint32) << shift)
            known = known | (tl.full([], 0xFF, tl.uint32) << shift)
            shift -= 8

        b_top = key_value(prefix)
        b_tau = 0.0
        if SOFT:
            b_tau = soft_threshold(
                b_top, keep, first_unit, end, p_scores, p_table, stride_score_block,
                PAGE, UNIT, POOLING, BLOCK,
            )  # fmt: skip
        # compaction in order: all keys above the threshold and the first ``need`` equal to it. A
        # kept list is compacted in place: no candidate moves up, and cumsum is a barrier
        written = keep * 0
        equal_seen = keep * 0
        for start in range(0, candidates, BLOCK):
            o_u, m_u = candidate_units(start + o_b, candidates, listed, fresh, p_units, MEMO)
            b_z = load_unit_scores(
                o_u, m_u, p_scores, p_table, stride_score_block, PAGE, UNIT, POOLING, BLOCK
            )
            b_key = ordered_key(b_z)
            b_equal = (m_u & (b_key == prefix)).to(tl.int32)
            m_equal = (b_equal == 1) & (equal_seen + tl.cumsum(b_equal, 0) <= need)
            b_take = ((m_u & (b_key > prefix)) | m_equal).to(tl.int32)
            o_slot = written + tl.cumsum(b_take, 0) - b_take
            # the bound only matters if rounding of a pooled score differed between two passes
            m_slot = (b_take == 1) & (o_slot < keep)
            tl.store(p_units + o_slot, o_u, mask=m_slot)
            if SOFT:
                b_gate = tl.minimum(tl.maximum(b_z - b_top - b_tau, 0.0), 1.0)
                # fewer than keep units have a score: -inf - -inf is nan
                b_gate = tl.where(b_top == float("-inf"), 1.0, b_gate)
                tl.store(p_gates + o_slot, b_gate, mask=m_slot)
            written += tl.sum(b_take, 0)
            equal_seen += tl.sum(b_equal, 0)
        written = tl.minimum(written, keep)

    for start in range(written, max_units, BLOCK):
        o_slot = start + o_b
        tl.store(p_units + o_slot, tl.full([BLOCK], -1, tl.int32), mask=o_slot < max_units)
        if SOFT:
            tl.store(p_gates + o_slot, tl.zeros([BLOCK], tl.float32), mask=o_slot < max_units)


def supported(unit: int, page: int) -> tuple[bool, str]:
    """Whether the kernel selects units of ``unit`` tokens from pages of ``page``, and why not."""
    if unit in (1, page):
        return True, ""
    return False, f"budget.unit is {unit}: the Triton kernel selects tokens (1) or pages ({page})"


def select(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    pooling: str,
    soft: bool,
    units_out: torch.Tensor,
    gates_out: torch.Tensor | None = None,
    memo: SelectionMemo | None = None,
) -> None:
    """See ``reference.select`` and ``SelectionMemo``."""
    items, heads, width = units_out.shape
    if items == 0:
        return
    by_token = budget.unit == 1
    select_fwd_kernel[(items, heads)](
        scores, block_table, item_row, item_position,
        units_out, gates_out if soft else units_out,
        memo.stamps if memo is not None else units_out, memo.step if memo is not None else item_row,
        *budget_arguments(budget), width,
        scores.stride(0), scores.stride(1), block_table.stride(0),
        units_out.stride(0), units_out.stride(1),
        PAGE=scores.shape[2], UNIT=budget.unit, POOLING=pooling, SOFT=soft, MEMO=memo is not None,
        BLOCK=TOKEN_BLOCK if by_token else PAGE_BLOCK,
        num_warps=TOKEN_WARPS if by_token else PAGE_WARPS,
    )  # fmt: skip


def select_scored(
    unit_scores: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    units_out: torch.Tensor,
) -> None:
    """Exact top-k of unit scores that every item brings along.

    Args:
        unit_scores: [items, H, U] float32, of the units that compete; others are not read.
        item_row: [items] int32 (negative: an empty item); item_position: [items] int32.
        budget: the budget.
        units_out: [items, H, K] int32, every element is written.
    """
    items, heads, width = units_out.shape
    select_fwd_kernel[(items, heads)](
        unit_scores, item_row, item_row, item_position, units_out, units_out, units_out, item_row,
        *budget_arguments(budget), width, unit_scores.stride(0), unit_scores.stride(1), 0,
        units_out.stride(0), units_out.stride(1),
        PAGE=budget.unit, UNIT=budget.unit, POOLING="none", SOFT=False, MEMO=False,
        BLOCK=TOKEN_BLOCK, num_warps=TOKEN_WARPS,
    )  # fmt: skip


_TYPES = "*fp32 *i32 *i32 *i32 *i32 *fp32 *i32 *i32 i32 i32 i32 i32 i64 i32 i64 i32 i32 i64 i32"
# (kernel, argument types, constexprs, options); see common/compile_targets.py
COMPILE_CASES = [
    (
        select_fwd_kernel,
        _TYPES,
        {
            "PAGE": page,
            "UNIT": unit,
            "POOLING": pooling,
            "SOFT": soft,
            "MEMO": memo,
            "BLOCK": TOKEN_BLOCK if unit == 1 or pooling == "none" else PAGE_BLOCK,
        },
        {"num_warps": TOKEN_WARPS if unit == 1 or pooling == "none" else PAGE_WARPS},
    )
    for page, unit, pooling, soft, memo in [
        (16, 1, "lse", False, True),
        (16, 1, "lse", True, True),
        (16, 16, "lse", False, True),
        (128, 128, "lse", True, False),
        (32, 32, "mean", False, False),
        (32, 32, "max", False, False),
        (16, 16, "max", True, True),
        (64, 64, "lse", False, False),
        (48, 48, "lse", True, False),
        (16, 16, "none", False, False),
    ]
]
