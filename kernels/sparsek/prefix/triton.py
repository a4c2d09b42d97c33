"""Prefix on the GPU: one program walks a row once, with three marks in the sorted scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def prefix_fwd_kernel(
    scores_ptr,  # [rows, n] float32 or float64
    sorted_ptr,  # [rows, n], every row descending, of equal scores the earlier first
    order_ptr,  # [rows, n] int32, position of every sorted score
    rank_ptr,  # [rows, n] int32, place of every score in the sorted row
    tau_ptr,  # [rows, n] of the scores' dtype
    expiry_ptr,  # [rows, n] int32, holds n everywhere
    n,
    k,
    stride_scores,
    stride_work,  # of sorted, order and rank
    stride_tau,
    stride_expiry,
    LOWEST: tl.constexpr,  # tau while everything fits
):
    """Thresholds and expiry times of one row.

    The marks only move from low to high scores, so a row costs O(n). A sorted score behind a
    mark, whether it has arrived yet or not, has
        worst: lost its place,
        floor: gate 0,
        cap: a gate below 1.
    tau moves from one such point to the next while the mass is above k. Comparing ranks with
    marks, not scores with tau, says what an arriving entry is: no rounding can contradict it.
    """
    i_r = tl.program_id(0).to(tl.int64)
    p_scores = scores_ptr + i_r * stride_scores
    p_sorted = sorted_ptr + i_r * stride_work
    p_order = order_ptr + i_r * stride_work
    p_rank = rank_ptr + i_r * stride_work
    p_tau = tau_ptr + i_r * stride_tau
    p_expiry = expiry_ptr + i_r * stride_expiry

    worst = n - 1
    floor = n - 1
    # scores of -inf never have a gate: both marks begin past them
    while (floor >= 0) & (tl.load(p_sorted + tl.maximum(floor, 0)) == float("-inf")):
        floor -= 1
    cap = floor
    support = n * 0  # entries with a gate
    inside = n * 0  # entries with a gate below 1
    b_tau = tl.full([], float("-inf"), tl.float64)
    for i in range(n):
        i_rank = tl.load(p_rank + i)
        if i >= k:
            # the worst of those that have a place
            last = tl.load(p_order + worst)
            while last >= i:
                worst -= 1
                last = tl.load(p_order + worst)
            if i_rank > worst:
                tl.store(p_expiry + i, i)
            else:
                tl.store(p_expiry + last, i)
                worst -= 1
        if i_rank <= floor:
            b_excess = tl.full([], 1.0, tl.float64)
            support += 1
            if i_rank > cap:
                inside += 1
                b_excess = tl.load(p_scores + i).to(tl.float64) - b_tau
            # a support of k has a mass of at most k, whatever rounding says
            while (b_excess > 0.0) & (support > k):
                b_floor = tl.load(p_sorted + floor).to(tl.float64)
                b_cap = tl.load(p_sorted + tl.maximum(cap, 0)).to(tl.float64) - 1.0
                m_cap = (cap >= 0) & (b_cap <= b_floor)
                b_next = tl.where(m_cap, b_cap, b_floor)
                # nothing is inside while tau is -inf
                b_loss = inside * (b_next - tl.where(inside > 0, b_tau, b_next))
                if b_loss >= b_excess:
                    b_tau = tl.minimum(b_tau + b_excess / inside, b_next)
                    b_excess = b_excess * 0.0
                else:
                    b_excess -= b_loss
                    b_tau = b_next
                    if m_cap:
                        inside += (tl.load(p_order + cap) <= i).to(tl.int32)
                        cap -= 1
                    else:
                        gone = (tl.load(p_order + floor) <= i).to(tl.int32)
                        inside -= gone
                        support -= gone
                        floor -= 1
        tl.store(p_tau + i, tl.maximum(b_tau, LOWEST).to(tau_ptr.dtype.element_ty))


def prefix(scores: torch.Tensor, k: int, tau_out: torch.Tensor, expiry_out: torch.Tensor) -> None:
    """See ``api.prefix``."""
    rows, n = scores.shape
    expiry_out.fill_(n)
    if scores.numel() == 0:
        return
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    place = torch.arange(n, dtype=torch.int32, device=scores.device)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, place.expand_as(order))
    prefix_fwd_kernel[(rows,)](
        scores, ordered, order.int(), rank, tau_out, expiry_out, n, k,
        scores.stride(0), ordered.stride(0), tau_out.stride(0), expiry_out.stride(0),
        LOWEST=torch.finfo(scores.dtype).min, num_warps=1,
    )  # fmt: skip


# (kernel, argument types, constexprs, options); see common/compile_targets.py
COMPILE_CASES = [
    (
        prefix_fwd_kernel,
        f"*{dtype} *{dtype} *i32 *i32 *{dtype} *i32 i32 i32 i64 i64 i64 i64",
        {"LOWEST": torch.finfo(torch_dtype).min},
        {"num_warps": 1},
    )
    for dtype, torch_dtype in (("fp32", torch.float32), ("fp64", torch.float64))
]
