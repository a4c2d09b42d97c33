"""Exact top-k of static scores: what may be among the best is sifted out, and its best found."""

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
    budget_arguments,
    end_unit,
    of_head,
    page_argument,
    units_kept,
)
from vllm_sparsek.kernels.common.early_launch import begin, launch_early
from vllm_sparsek.kernels.select import expiry
from vllm_sparsek.kernels.select.chunk import ChunkBases
from vllm_sparsek.kernels.select.device import radix_best
from vllm_sparsek.kernels.select.memo import SelectionMemo
from vllm_sparsek.kernels.select.pooling import page_blocks, page_chunk, pool_pages
from vllm_sparsek.kernels.select.sifting import fold_best

TOKEN_BLOCK = 4096  # token scores per tile, at least
MAX_FOLD = 8192  # tokens kept that leave room for as many more in a tile
MAX_ROOM = 16384
# pages per tile; at least one per thread, since every page score lives in one thread
PAGE_BLOCK = 128
PAGE_WARPS = 4
PAGE_FOLD_BLOCK = 256
MAX_FOLD_PAGES = 512
MOST_POOLED = 16384  # pages of a context that are all pooled, with so many warps
POOL_WARPS = 16
LEAST_BLOCK = 256  # of scores: smaller tiles would only be more compilations
PER_THREAD = 16  # scores of a tile that a thread holds
# scores that there is at least room to sieve: every other size is a compilation, which a server
# would make when a prompt is longer than any before
LEAST_SIEVED = 1 << 17
# where more units than this compete, items start from bases
BASE_FROM = 1024
POOL_PAIRS = 128  # (page, head) pairs per program of pool_fwd_kernel
POOL_HEADS = 16
POOL_PROGRAMS = 2112  # 16 a multiprocessor of an H200: more read scores no faster
POOLED_BYTES = 64 << 20  # of pooled scores at once; beyond it every program pools for itself


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def select_fwd_kernel(
    scores_ptr,  # [num_blocks, H, page] float32; if POOLING is "none", see BY_ROW
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    units_ptr,  # [items, H, K] int32
    gates_ptr,  # [items, H, K] float32 (SOFT)
    stamps_ptr,  # [items, H, 4] int32 (MEMO)
    step_ptr,  # [1] int32 (MEMO)
    base_ptr,  # [bases, H, K] int32 (BASE)
    base_bounds_ptr,  # [bases, 3] int32 (BASE)
    item_base_ptr,  # [items] int32 (BASE)
    room_ptr,  # [items, H, ROOM + WORDS] int32 (ROOM > 0), for streams longer than ROOM
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
    BY_ROW: tl.constexpr,  # scores of units are [rows, H, U], else [items, H, U]
    SOFT: tl.constexpr,
    MEMO: tl.constexpr,
    BASE: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Kept units, ascending, of one (item, KV head).

    Under BASE the candidates are the units of a base and those that left the window since.
    Every element of the output is written, except under MEMO where the selection of the step
    before still stands or the item is padding. Where it was made in an earlier refresh block, only
    its units and those that left the window since are candidates.
    """
    begin(EARLY)
    i_i, i_h = tl.program_id(0), tl.program_id(1)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
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
        i_scores = tl.maximum(row, 0) if BY_ROW else i_i
        p_scores += i_scores.to(tl.int64) * stride_score_block

    p_list = p_units
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
        last_block = first_block
        kept_last_block = first_block
        if PAGE != 0:
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
            fresh = kept_end
            listed = kept_units
    if BASE:
        i_base = tl.load(item_base_ptr + i_i)
        p_list = base_ptr + (i_base.to(tl.int64) * tl.num_programs(1) + i_h) * max_units
        base_end = end_unit(tl.load(base_bounds_ptr + i_base * 3 + 1), first_unit, window, UNIT)
        base_keep = units_kept(tl.load(base_bounds_ptr + i_base * 3 + 2), k, share_bits, UNIT)
        listed = tl.minimum(tl.minimum(base_keep, max_units), base_end - first_unit)
        fresh = base_end
    if FOLD:
        i_room = i_i.to(tl.int64) * tl.num_programs(1) + i_h
        fold_best(
            keep, first_unit, p_list, listed, fresh, end, p_scores, p_table, stride_score_block,
            room_ptr + i_room * (ROOM + WORDS), p_units, max_units, PAGE, UNIT, POOLING,
            MEMO or BASE, BLOCK, ROOM, WORDS,
        )  # fmt: skip
    else:
        radix_best(
            keep, first_unit, p_list, listed, fresh, end, p_scores, p_table, stride_score_block,
            p_units, p_gates, max_units, PAGE, UNIT, POOLING, SOFT, MEMO or BASE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units"])
def base_fwd_kernel(
    scores_ptr,  # [num_blocks, H, page] float32; [rows, H, U] if POOLING is "none"
    block_table_ptr,  # [rows, max_blocks] int32
    base_bounds_ptr,  # [bases, 3] int32
    units_ptr,  # [bases, H, K] int32
    room_ptr,  # [bases, H, ROOM + WORDS] int32 (ROOM > 0), for streams longer than ROOM
    first_unit,
    window,
    k,
    share_bits,
    max_units,  # K
    stride_score_block,
    stride_score_head,
    stride_table_row,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The best units of one (base, KV head), ascending, padded with -1."""
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
    i_base = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    row = tl.load(base_bounds_ptr + i_b * 3)
    end = end_unit(tl.load(base_bounds_ptr + i_b * 3 + 1), first_unit, window, UNIT)
    keep = units_kept(tl.load(base_bounds_ptr + i_b * 3 + 2), k, share_bits, UNIT)
    keep = tl.minimum(tl.minimum(keep, max_units), end - first_unit)
    listed = keep * 0
    p_scores = scores_ptr + i_h.to(tl.int64) * stride_score_head
    if POOLING == "none":
        p_scores += row.to(tl.int64) * stride_score_block
    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    p_units = units_ptr + i_base * max_units
    if FOLD:
        fold_best(
            keep, first_unit, p_units, listed, first_unit, end, p_scores, p_table,
            stride_score_block, room_ptr + i_base * (ROOM + WORDS), p_units, max_units, PAGE, UNIT,
            POOLING, False, BLOCK, ROOM, WORDS,
        )  # fmt: skip
    else:
        radix_best(
            keep, first_unit, p_units, listed, first_unit, end, p_scores, p_table,
            stride_score_block, p_units, p_units, max_units, PAGE, UNIT, POOLING, False, False,
            BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_unit", "window", "refresh", "heads"])
def pool_fwd_kernel(
    scores_ptr,  # [num_blocks, H, page] float32
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    pooled_ptr,  # [rows, H, U] float32
    first_unit,
    window,
    refresh,
    heads,  # H
    stride_score_block,
    stride_score_head,
    stride_table_row,
    stride_pooled_row,
    stride_pooled_head,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Scores of the pages that compete for an item, but not for the item before it.

    Whatever the order of items, together they pool all that competes for any of them.
    """
    i_i, i_h, i_t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(item_row_ptr + i_i)
    if row < 0:
        return
    start = tl.load(item_position_ptr + i_i) // refresh * refresh
    end = end_unit(start, first_unit, window, UNIT)
    row_before = tl.load(item_row_ptr + i_i - 1, mask=i_i > 0, other=-1)
    start_before = tl.load(item_position_ptr + i_i - 1, mask=i_i > 0, other=0) // refresh * refresh
    end_before = end_unit(start_before, first_unit, window, UNIT)
    begin = tl.where(row_before == row, end_before, first_unit)

    o_b = tl.arange(0, UNITS * HEADS)
    o_h = i_h * HEADS + o_b % HEADS
    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    p_pooled = pooled_ptr + row.to(tl.int64) * stride_pooled_row
    o_head = o_h.to(tl.int64) * stride_score_head
    for at in range(begin + i_t * UNITS, end, tl.num_programs(2) * UNITS):
        o_u = at + o_b // HEADS
        m_u = (o_u < end) & (o_h < heads)
        b_block = page_blocks(o_u, m_u, p_table, PAGE)
        p_page = page_chunk(o_u, b_block, scores_ptr, p_table, stride_score_block, PAGE, UNIT)
        b_z = pool_pages(p_page + o_head[:, None], m_u, UNIT, POOLING, UNITS * HEADS)
        tl.store(p_pooled + o_h * stride_pooled_head + o_u, b_z, mask=m_u)


def supported(unit: int, page: int, columns: int) -> tuple[bool, str]:
    """Whether the kernel selects units of ``unit`` tokens from pages of ``page``, and why not."""
    if unit in (1, page) or page_argument(page, columns) == 0:
        return True, ""
    return False, f"budget.unit is {unit}: the Triton kernel selects tokens (1) or pages ({page})"


def _tile(
    pages: bool, soft: bool, width: int | None, longest: int | None = None, based: bool = False
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constexprs and options of the kernels that keep up to ``width`` units (None: any number).

    Args:
        pages: a unit is a page whose score is pooled; soft: gates are made.
        longest: no stream of candidates is longer (None: any).
        based: streams are hardly longer than a tile, as those of items with a base.
    """
    if soft or width is None or width > (MAX_FOLD_PAGES if pages else MAX_FOLD):
        block, warps = (PAGE_BLOCK, PAGE_WARPS) if pages else (TOKEN_BLOCK, TOKEN_BLOCK // 512)
        tile = {"FOLD": False, "BLOCK": block, "ROOM": 0, "WORDS": 0}
        return tile, {"num_warps": warps}
    least = PAGE_FOLD_BLOCK if pages else TOKEN_BLOCK
    block = max(least, triton.next_power_of_2(2 * width))
    # a thread loads a page's scores, or as many of tokens
    threads = 32 * (1 if pages else PER_THREAD)
    least_warps = PAGE_WARPS if pages else 1
    if longest is not None and longest <= block:
        block = max(LEAST_BLOCK, triton.next_power_of_2(longest))
        # without room for more, and with few registers, many programs run side by side
        return (
            {"FOLD": True, "BLOCK": block, "ROOM": 0, "WORDS": 0},
            {"num_warps": max(least_warps, min(16, block // threads)), "maxnreg": 128},
        )
    room = block if based else min(2 * block, MAX_ROOM)
    options = {"num_warps": max(4, room // 64 if pages else room // 512)}
    if based:
        options["maxnreg"] = 128
    words = 0
    if longest is not None and not pages and not based:
        # int32 that hold words of 16 scores, two each
        words = max(LEAST_SIEVED, triton.next_power_of_2(longest)) // 32 + 16
    if longest is not None and pages and longest <= MOST_POOLED:
        # scores of pages, one each
        words = triton.next_power_of_2(longest)
        options["num_warps"] = POOL_WARPS
    return {"FOLD": True, "BLOCK": block, "ROOM": room, "WORDS": words}, options


def _room(tile: dict[str, Any], units_out: torch.Tensor) -> torch.Tensor:
    """Where streams are sifted: [items, H, ROOM + WORDS] int32, or anything if they never are."""
    if tile["ROOM"] == 0:
        return units_out
    return units_out.new_empty((*units_out.shape[:2], tile["ROOM"] + tile["WORDS"]))


def shares_base(width: int, competing: int) -> bool:
    """Whether items of a row may gain from a base: not where few more units compete than are kept.

    Args:
        width: units kept; competing: most units that compete for them.
    """
    small = triton.next_power_of_2(max(width, 1)) < triton.next_power_of_2(max(competing, 1))
    return bool(competing > BASE_FROM and small)


def _base_pays(items: int, bases: int, based: int, competing: int) -> bool:
    """Whether ``bases`` bases leave ``items`` items tiles so much smaller that it is worth it.

    Args:
        based: the longest stream of an item with a base; competing: of one without.
    """
    return shares_base(based, competing) and 2 * bases <= items


def _pooled(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    pooling: str,
    competing: int,
) -> torch.Tensor | None:
    """[rows, H, U] float32: scores of the pages that compete for items; None if too many bytes."""
    rows, heads, units = block_table.shape[0], scores.shape[1], budget.first_unit() + competing
    # a multiple of 16 leaves loads wide
    shape = rows, heads, -(-units // 16) * 16
    if 4 * math.prod(shape) > POOLED_BYTES:
        return None
    pooled = torch.empty(shape, dtype=torch.float32, device=scores.device)
    at_once = min(POOL_HEADS, triton.next_power_of_2(heads))
    tile = {"UNITS": POOL_PAIRS // at_once, "HEADS": at_once}
    items, groups = item_row.shape[0], triton.cdiv(heads, at_once)
    tiles = triton.cdiv(max(competing, 1), tile["UNITS"])
    grid = items, groups, max(1, min(tiles, POOL_PROGRAMS // (items * groups)))
    first_unit, window, refresh, *_ = budget_arguments(budget, scores.device)
    pool_fwd_kernel[grid](
        scores, block_table, item_row, item_position, pooled, first_unit, window, refresh, heads,
        scores.stride(0), scores.stride(1), block_table.stride(0), shape[1] * shape[2], shape[2],
        PAGE=page_argument(scores.shape[2], block_table.shape[1]), UNIT=budget.unit,
        POOLING=pooling, **tile, num_warps=PAGE_WARPS,
    )  # fmt: skip
    return pooled


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
    bases: ChunkBases | None = None,
) -> None:
    """See ``reference.select``, ``SelectionMemo`` and ``ChunkBases``."""
    items, heads, width = units_out.shape
    if items == 0:
        return
    last = block_table.shape[1] * scores.shape[2] - 1
    if bases is not None:
        last = bases.longest + bases.span
    competing = budget.units_competing(budget.selection_position(last))
    page, by_row = page_argument(scores.shape[2], block_table.shape[1]), False
    if budget.unit > 1 and memo is None:
        pooled = _pooled(scores, block_table, item_row, item_position, budget, pooling, competing)
        if pooled is not None:
            if not soft and expiry.pays(budget, items, block_table.shape[0], pooled.shape[2]):
                expiry.select_by_expiry(pooled, item_row, item_position, budget, units_out)
                return
            scores, pooling, by_row = pooled, "none", True
    pages = budget.unit > 1 and not by_row
    # of a stream: what can compete, with holes in a list that is taken up again
    longest = competing + (width if memo is not None else 0)
    base, base_bounds, item_base = units_out, item_row, item_row
    if bases is not None:
        based = width + triton.cdiv(bases.span, budget.unit)
        if not _base_pays(items, bases.bounds.shape[0], based, competing):
            bases = None
    if bases is not None:
        longest = based
        base = _base_lists(scores, block_table, bases, budget, page, pooling, width)
        base_bounds, item_base = bases.bounds, bases.item_base
    tile, options = _tile(pages, soft, width, longest, bases is not None)
    select_fwd_kernel[(items, heads)](
        scores, block_table, item_row, item_position,
        units_out, gates_out if soft else units_out,
        memo.stamps if memo is not None else units_out, memo.step if memo is not None else item_row,
        base, base_bounds, item_base, _room(tile, units_out),
        *budget_arguments(budget, scores.device), width,
        scores.stride(0), scores.stride(1), block_table.stride(0),
        units_out.stride(0), units_out.stride(1),
        PAGE=page, UNIT=budget.unit, POOLING=pooling, BY_ROW=by_row, SOFT=soft,
        MEMO=memo is not None, BASE=bases is not None, **tile, **options,
        **launch_early(scores.device),
    )  # fmt: skip


def _base_lists(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    bases: ChunkBases,
    budget: Budget,
    page: int,
    pooling: str,
    width: int,
) -> torch.Tensor:
    """[bases, H, width] int32: the best units of every base."""
    pages = budget.unit > 1 and pooling != "none"
    tile, options = _tile(pages, False, width, budget.units_competing(bases.longest))
    first_unit, window, _, k, share_bits = budget_arguments(budget, scores.device)
    shape = (bases.bounds.shape[0], scores.shape[1], width)
    units = torch.empty(shape, dtype=torch.int32, device=scores.device)
    base_fwd_kernel[shape[:2]](
        scores, block_table, bases.bounds, units, _room(tile, units),
        first_unit, window, k, share_bits, width,
        scores.stride(0), scores.stride(1), block_table.stride(0),
        PAGE=page, UNIT=budget.unit, POOLING=pooling, **tile, **options,
    )  # fmt: skip
    return units


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
    tile, options = _tile(False, False, width, unit_scores.shape[2])
    select_fwd_kernel[(items, heads)](
        unit_scores, item_row, item_row, item_position, units_out, units_out, units_out, item_row,
        units_out, item_row, item_row, _room(tile, units_out),
        *budget_arguments(budget, units_out.device), width,
        unit_scores.stride(0), unit_scores.stride(1), 0,
        units_out.stride(0), units_out.stride(1),
        PAGE=budget.unit, UNIT=budget.unit, POOLING="none", BY_ROW=False, SOFT=False, MEMO=False,
        BASE=False, **tile, **options, **launch_early(units_out.device),
    )  # fmt: skip


_TYPES = (
    "*fp32 *i32 *i32 *i32 *i32 *fp32 *i32 *i32 *i32 *i32 *i32 *i32 "
    "i32 i32 i32 i32 i64 i32 i64 i32 i32 i64 i32"
)


def compile_case(
    page: int,
    unit: int,
    pooling: str,
    soft: bool,
    start: str,
    width: int | None,
    longest: int | None = None,
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``select_fwd_kernel``, as ``common/compile_targets.py`` takes it.

    Args:
        start: memo, base or neither; width: None for a variant that keeps any number.
        longest: see ``_tile``.
    """
    pages = unit > 1 and pooling != "none"
    tile, options = _tile(pages, soft, width, longest, start == "base")
    constexprs = {
        "PAGE": page, "UNIT": unit, "POOLING": pooling, "BY_ROW": pooling == "none", "SOFT": soft,
        "MEMO": start == "memo", "BASE": start == "base", "EARLY": False, **tile,
    }  # fmt: skip
    return select_fwd_kernel, _TYPES, constexprs, options


def base_case(
    page: int, unit: int, pooling: str = "lse"
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``base_fwd_kernel``."""
    tile, options = _tile(unit > 1 and pooling != "none", False, 2048 // unit, 1 << 17)
    types = "*fp32 *i32 *i32 *i32 *i32 i32 i32 i32 i64 i32 i32 i32 i32"
    constexprs = {"PAGE": page, "UNIT": unit, "POOLING": pooling, **tile}
    return base_fwd_kernel, types, constexprs, options


def pool_case(
    page: int, unit: int, pooling: str, heads: int
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``pool_fwd_kernel``."""
    types = "*fp32 *i32 *i32 *i32 *fp32 i32 i32 i32 i32 i32 i32 i32 i32 i32"
    tile = {"UNITS": POOL_PAIRS // heads, "HEADS": heads}
    constexprs = {"PAGE": page, "UNIT": unit, "POOLING": pooling, **tile}
    return pool_fwd_kernel, types, constexprs, {"num_warps": PAGE_WARPS}


_VARIANTS: list[tuple[Any, ...]] = [
    (16, 1, "lse", False, "memo", 2048, 131072),
    (64, 1, "lse", False, "", 8192, 131072),
    (16, 1, "lse", False, "memo", None),
    (16, 1, "lse", True, "memo", 2048),
    (16, 1, "lse", False, "base", 2048),
    (16, 1, "lse", False, "base", 2048, 3000),
    (16, 16, "lse", False, "memo", 128),
    (16, 16, "lse", False, "memo", None),
    (128, 128, "lse", True, "memo", 16),
    (32, 32, "mean", False, "memo", 64),
    (32, 32, "max", False, "memo", 64),
    (16, 16, "max", True, "memo", 128),
    (64, 64, "lse", False, "memo", 32),
    (48, 48, "lse", True, "memo", 32),
    (16, 16, "none", False, "", 128, 10000),
    (16, 16, "none", False, "", 32, 220),
    (16, 16, "none", True, "", None),
    (16, 16, "none", False, "base", 128, 260),
    (0, 1, "lse", False, "", None),
    (0, 1, "lse", False, "base", 2048, 3000),
    (0, 1, "lse", False, "", 2048, 4000),
    (0, 1, "lse", False, "", 2048, 32768),
    (0, 16, "none", False, "", 128, 2000),
    (0, 16, "lse", False, "memo", 128),
]
COMPILE_CASES = [
    *(compile_case(*case) for case in _VARIANTS),
    *(
        of_heads(compile_case(*case))
        for case in [
            (32, 1, "lse", False, "memo", 2048),
            (32, 1, "lse", True, "memo", 2048),
            (32, 1, "lse", False, "base", 2048),
        ]
    ),
    *(base_case(*case) for case in ((16, 1), (16, 16), (16, 16, "none"), (0, 1))),
    of_heads(base_case(32, 1)),
    *(
        pool_case(*case)
        for case in [
            (16, 16, "lse", 16),
            (48, 48, "mean", 2),
            (128, 128, "max", 8),
            (0, 16, "lse", 1),
        ]
    ),
]
