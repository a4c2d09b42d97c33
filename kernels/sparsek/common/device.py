"""Device code that two kernels share: the budget's integer rules and the list a query reads.

Budgets reach a kernel as five scalars (see ``budget_arguments``): ``first_unit``, ``window``,
``refresh``, ``k`` and ``share_bits``; the unit is a constexpr. Where KV heads differ, the last two
are pointers to one number a head (see ``of_head``).
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget

# scalars that differ between models or layers: never worth a second compilation
BUDGET_SCALARS = ["first_unit", "window", "refresh", "k", "share_bits"]
MIN_BLOCK_M = 16  # the smallest tile tl.dot takes
FP8_MAX = tl.constexpr(448.0)

# of a budget, or one a KV head
Number = int | torch.Tensor


@functools.lru_cache(maxsize=1024)
def budget_arguments(budget: Budget, device: torch.device) -> tuple[int, int, int, Number, Number]:
    """``budget`` as kernel arguments: (first_unit, window, refresh, k, share_bits).

    ``share_bits`` are the bits of the float64 ``k_share`` (0 without one): Triton passes a
    Python float as float32, which would round ``ceil(share * n)`` differently. With
    ``budget.heads``, ``k`` is [H] int32 and ``share_bits`` [H] int64 on ``device``; the first call
    copies them there, which a CUDA graph must not capture.
    """
    numbers: tuple[Number, Number] = budget.k, _share_bits(budget.k_share)
    if budget.heads:
        numbers = _head_numbers(budget.heads, device)
    return budget.first_unit(), budget.window, budget.refresh, *numbers


# captured graphs hold these addresses: they are never given up
@functools.cache
def _head_numbers(
    heads: tuple[tuple[int, float | None], ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.tensor([k for k, _ in heads], dtype=torch.int32, device=device)
    share_bits = [_share_bits(share) for _, share in heads]
    return k, torch.tensor(share_bits, dtype=torch.int64, device=device)


def _share_bits(share: float | None) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", share or 0.0))
    return int(bits)


def page_argument(page: int, columns: int) -> int:
    """The constexpr PAGE of a kernel that reads a cache through a block table.

    Args:
        page: tokens of a block; columns: columns of the block table.

    Returns:
        ``page``, or 0 where the table has one column: a row is one block then, of a length that
        is not worth a compilation.
    """
    return 0 if columns == 1 else page


def slots_per_block(cache: torch.Tensor) -> int | None:
    """Tokens of one head from one block of ``cache`` to the next, None if that is no number.

    Args:
        cache: [num_blocks, H, page, width]. Kernels address a token by its slot: how many tokens
            it lies behind the first one of its head.
    """
    block, _, token, _ = cache.stride()
    return block // token if token and block % token == 0 else None


@triton.jit
def of_head(number, i_h):
    """``number`` of a budget, or that of KV head ``i_h`` where it points to one a head."""
    if number.dtype.is_ptr():
        number = tl.load(number + i_h)
    return number


@triton.jit
def fp8_of(b_x):
    """float32 as it can be rounded to float8_e4m3fn: beyond its largest number, that one."""
    return tl.minimum(tl.maximum(b_x, -FP8_MAX), FP8_MAX)


@triton.jit
def units_kept(start, k, share_bits, UNIT: tl.constexpr):
    """Units that the selection made at position ``start`` keeps; as ``Budget.units_kept``."""
    b_share = share_bits.to(tl.int64).to(tl.float64, bitcast=True)
    b_share_tokens = tl.ceil(b_share * (start + 1).to(tl.float64)).to(tl.int32)
    return (tl.maximum(k, b_share_tokens) + UNIT - 1) // UNIT


@triton.jit
def end_unit(start, first_unit, window, UNIT: tl.constexpr):
    """One past the last unit that competes at ``start``; as ``Budget.end_unit``.

    // truncates where python floors: both are below first_unit then.
    """
    return tl.maximum(first_unit, (start - window + 1) // UNIT)


@triton.jit
def list_bounds(
    position,
    last,
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,
    UNIT: tl.constexpr,
):
    """The list of tokens that queries ``position``..``last`` of one refresh block read.

    The list is: sinks, tokens of kept units, window up to ``last``.

    Returns:
        sink tokens, kept units, position where the window starts, length of the list.
    """
    start = position // refresh * refresh
    end = end_unit(start, first_unit, window, UNIT)
    kept = tl.minimum(units_kept(start, k, share_bits, UNIT), end - first_unit)
    kept = tl.minimum(kept, max_units)
    sinks = tl.minimum(first_unit * UNIT, last + 1)
    window_start = end * UNIT
    total = sinks + kept * UNIT + tl.maximum(last + 1 - window_start, 0)
    return sinks, kept, window_start, total


@triton.jit
def load_kept_units(
    o_kept,  # [N] places in the list, from its kept tokens on
    kept,
    p_units,  # [K] int32, the kept units of this item and head
    UNIT: tl.constexpr,
):
    """Units [N] of the first ``kept``, 0 at other places."""
    m_kept = (o_kept >= 0) & (o_kept < kept * UNIT)
    return tl.load(p_units + o_kept // UNIT, mask=m_kept, other=0)


@triton.jit
def positions_of(
    o_n,  # [N] places in the list
    b_unit,  # [N] kept units at these places
    sinks,
    kept,
    window_start,
    total,
    UNIT: tl.constexpr,
):
    """Token positions at places ``o_n`` of the list.

    Returns:
        positions [N] (0 where there is none) and whether there is one [N].
    """
    o_kept = o_n - sinks
    m_kept = (o_kept >= 0) & (o_kept < kept * UNIT)
    m_n = (o_n < total) & ((b_unit >= 0) | (m_kept == 0))
    o_pos = tl.where(m_kept, b_unit * UNIT + o_kept % UNIT, window_start + o_kept - kept * UNIT)
    o_pos = tl.where(o_n < sinks, o_n, o_pos)
    return tl.where(m_n, o_pos, 0), m_n


@triton.jit
def list_positions(
    o_n,  # [N] places in the list
    sinks,
    kept,
    window_start,
    total,
    p_units,  # [K] int32, the kept units of this item and head
    UNIT: tl.constexpr,
):
    """As ``positions_of``, with the kept units that are loaded for it."""
    b_unit = load_kept_units(o_n - sinks, kept, p_units, UNIT)
    return positions_of(o_n, b_unit, sinks, kept, window_start, total, UNIT)


@triton.jit
def list_gates(
    o_n,  # [N] places in the list
    sinks,
    kept,
    p_gates,  # [K] float32, the gates of this item's and head's kept units
    UNIT: tl.constexpr,
):
    """Weights [N] of the values at places ``o_n``: 1 for what is no kept unit's.

    Gates weigh values only: the denominator is that of plain softmax.
    """
    o_kept = o_n - sinks
    m_kept = (o_kept >= 0) & (o_kept < kept * UNIT)
    return tl.load(p_gates + o_kept // UNIT, mask=m_kept, other=1.0)


@triton.jit
def token_offsets(
    o_pos,  # [N] token positions
    m_n,  # [N]
    p_table,  # [max_blocks] int32, the request's row of the block table
    stride_block,
    stride_token,
    PAGE: tl.constexpr,
):
    """Offsets [N] int64 of tokens in a paged cache, within one head; see ``page_argument``."""
    if PAGE == 0:
        b_block = tl.load(p_table).to(tl.int64)
        o_token = o_pos
    else:
        b_block = tl.load(p_table + o_pos // PAGE, mask=m_n, other=0).to(tl.int64)
        o_token = o_pos % PAGE
    return b_block * stride_block + o_token.to(tl.int64) * stride_token


@triton.jit
def softmax_step(b_s, b_m, b_l):
    """One step of the running softmax in base 2.

    Args:
        b_s: [M, N] logits times log2(e), -inf where masked; b_m: [M] running maximum;
            b_l: [M] running denominator.

    Returns:
        weights [M, N], correction of earlier sums [M], new maximum [M], new denominator [M].
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # [M]
    # a row that has seen nothing keeps -inf, and -inf - -inf is nan
    b_safe = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s - b_safe[:, None])  # [M, N]
    b_alpha = tl.exp2(b_m - b_safe)  # [M]
    return b_p, b_alpha, b_m_new, b_l * b_alpha + tl.sum(b_p, 1)
