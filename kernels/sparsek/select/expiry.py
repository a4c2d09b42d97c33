"""Selections of all items of rows at once, by when units are outdone.

Where every item keeps k units, a unit that k others outdo is never kept again: what an item keeps
are the units that are not outdone yet. One walk over a row's scores tells when each one is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.compile_targets import of_heads
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    budget_arguments,
    end_unit,
    of_head,
    units_kept,
)

MAX_UNITS = 1024  # a walk takes a step a unit
PER_THREAD = 8  # scores that a thread of a walk holds
AT_ONCE = 8  # scores loaded before they are compared
LEAST_UNITS = 32
HEADS = 4  # per program of ``keep_fwd_kernel``
ITEMS_PER_ROW = 4  # fewer do not pay for a walk
NEVER = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["first_unit", "k", "share_bits", "units", "max_units"])
def expiry_fwd_kernel(
    scores_ptr,  # [rows, H, U] float32
    expiry_ptr,  # [rows, H, U] int32
    first_unit,
    k,
    share_bits,
    units,  # U
    max_units,  # K
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The end of the competing units from which on k of them outdo a unit, of one (row, KV head).

    Equal scores: the earlier unit stays. Scores behind the last unit of a row may be anything: they
    outdo nobody before.
    """
    i_row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    keep = units_kept(
        first_unit * 0, of_head(k, tl.program_id(1)), of_head(share_bits, tl.program_id(1)), UNIT
    )
    keep = tl.minimum(keep, max_units)
    p_scores = scores_ptr + i_row * units
    o_u = tl.arange(0, BLOCK)
    b_z = tl.load(p_scores + o_u, mask=o_u < units, other=0.0)
    b_better = tl.zeros([BLOCK], tl.int32)
    b_expiry = tl.full([BLOCK], NEVER, tl.int32)
    for begin in range(first_unit, units, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = begin + i
            z = tl.load(p_scores + at, mask=at < units, other=float("-inf"))
            b_better += ((z > b_z) | ((z == b_z) & (at < o_u))).to(tl.int32)
            b_expiry = tl.minimum(b_expiry, tl.where(b_better >= keep, at + 1, NEVER))
    tl.store(expiry_ptr + i_row * units + o_u, b_expiry, mask=o_u < units)


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "units", "max_units", "heads"])
def keep_fwd_kernel(
    expiry_ptr,  # [rows, H, U] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    units,  # U
    max_units,  # K
    heads,  # H
    stride_out_item,
    stride_out_head,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Kept units, ascending, then -1, of an item and HEADS KV heads."""
    i_i = tl.program_id(0)
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = tl.load(item_row_ptr + i_i)
    start = tl.load(item_position_ptr + i_i) // refresh * refresh
    end = end_unit(start, first_unit, window, UNIT)
    end = tl.where(row < 0, first_unit, end)
    o_u = tl.arange(0, BLOCK)
    m_u = (o_h < heads)[:, None] & ((o_u >= first_unit) & (o_u < end))[None, :]
    i_row = tl.maximum(row, 0).to(tl.int64) * heads + o_h
    b_expiry = tl.load(expiry_ptr + i_row[:, None] * units + o_u[None, :], mask=m_u, other=0)
    m_kept = m_u & (b_expiry > end)  # [HEADS, BLOCK]
    o_place = tl.cumsum(m_kept.to(tl.int32), 1) - 1
    p_units = units_ptr + i_i.to(tl.int64) * stride_out_item + o_h[:, None] * stride_out_head
    tl.store(p_units + o_place, tl.broadcast_to(o_u[None, :], m_kept.shape), mask=m_kept)
    b_kept = tl.sum(m_kept.to(tl.int32), 1)
    o_k = tl.arange(0, WIDTH)
    m_rest = (o_h < heads)[:, None] & (o_k[None, :] >= b_kept[:, None]) & (o_k < max_units)[None, :]
    tl.store(p_units + o_k[None, :], tl.full([HEADS, WIDTH], -1, tl.int32), mask=m_rest)


def pays(budget: Budget, items: int, rows: int, units: int) -> bool:
    """Whether one walk a row serves: items keep equally many, there are several, and few units.

    Args:
        items, rows: how many; units: of the longest row.
    """
    shares = [budget.k_share, *(share for _, share in budget.heads)]
    return not any(shares) and units <= MAX_UNITS and items >= ITEMS_PER_ROW * rows


def select_by_expiry(
    unit_scores: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    units_out: torch.Tensor,
) -> None:
    """Exact top-k of unit scores that the items of a row share.

    Args:
        unit_scores: [rows, H, U] float32, contiguous; those behind what competes may be anything.
        item_row: [items] int32 (negative: an empty item); item_position: [items] int32.
        budget: one for which it ``pays``.
        units_out: [items, H, K] int32, every element is written.
    """
    rows, heads, units = unit_scores.shape
    items, _, width = units_out.shape
    block = max(LEAST_UNITS, triton.next_power_of_2(units))
    expiry = torch.empty(unit_scores.shape, dtype=torch.int32, device=unit_scores.device)
    first_unit, window, refresh, k, share_bits = budget_arguments(budget, unit_scores.device)
    expiry_fwd_kernel[(rows, heads)](
        unit_scores, expiry, first_unit, k, share_bits, units, width, UNIT=budget.unit, BLOCK=block,
        AT_ONCE=AT_ONCE, num_warps=max(1, block // (32 * PER_THREAD)),
    )  # fmt: skip
    keep_fwd_kernel[(items, triton.cdiv(heads, HEADS))](
        expiry, item_row, item_position, units_out, first_unit, window, refresh, k, share_bits,
        units, width, heads, units_out.stride(0), units_out.stride(1), UNIT=budget.unit,
        BLOCK=block, WIDTH=triton.next_power_of_2(width), HEADS=HEADS, num_warps=4,
    )  # fmt: skip


EXPIRY_CASE: tuple[Any, str, dict[str, Any], dict[str, int]] = (
    expiry_fwd_kernel, "*fp32 *i32 i32 i32 i64 i32 i32",
    {"UNIT": 16, "BLOCK": 256, "AT_ONCE": AT_ONCE}, {"num_warps": 1},
)  # fmt: skip
KEEP_CASE: tuple[Any, str, dict[str, Any], dict[str, int]] = (
    keep_fwd_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32 i32 i64 i32 i32 i32 i64 i32",
    {"UNIT": 16, "BLOCK": 256, "WIDTH": 32, "HEADS": HEADS}, {"num_warps": 4},
)  # fmt: skip
COMPILE_CASES = [EXPIRY_CASE, of_heads(EXPIRY_CASE), KEEP_CASE, of_heads(KEEP_CASE)]
