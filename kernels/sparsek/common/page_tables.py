"""Lists as page tables: attention over a selection as FlashAttention-3 over a paged cache.

FlashAttention-3 reads a cache through one page table a request, which all KV heads share. Here
every (KV head, item) is a request with one KV head: its table names pages of that head alone, in
the order sinks, kept units, window, so that the queries' own positions come last and a causal
mask aligned to the bottom right hides exactly what a query must not see. That is exact since the
window's lower edge stands still within a refresh block, as the selection does: of one list, later
queries see more at its end and nothing less.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparsek import compat
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.compile_targets import of_heads
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    budget_arguments,
    fp8_of,
    list_bounds,
    list_positions,
    of_head,
    page_argument,
    token_offsets,
)
from vllm_sparsek.kernels.common.validate import FP8

FLOATS = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
ALIGNMENT = 16  # bytes that one load reads
# pages as long as a tile of FlashAttention-3 (80 tokens and more) would be copied as a whole, with
# slots behind the end of a list that hold anything
MAX_STEP = 64
TABLE_BLOCK = 1024  # entries per program of ``tables_fwd_kernel``
ROWS_BLOCK = 64  # (query, head) pairs per program of ``rows_fwd_kernel``


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "width", "most"])
def tables_fwd_kernel(
    block_table_ptr,  # [rows, max_blocks] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32 (not ONE)
    units_ptr,  # [items, H, K] int32
    table_ptr,  # [H * items, width] int32
    lengths_ptr,  # [H * items] int32
    starts_ptr,  # [H * items + 1] int32
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    width,
    most,  # queries that an item has room for
    per_block,  # pages from one block of the cache to the next
    per_head,  # from one KV head to the next
    per_page,  # from one page of a head to the next
    stride_table_row,
    stride_units_item,
    stride_units_head,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pages of STEP tokens that one (item, KV head) reads, the tokens on them, and its queries.

    ONE: items have one query, and requests are in order (item, KV head) instead.
    """
    i_i, i_h = tl.program_id(0), tl.program_id(1)
    k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
    if ONE:
        i_table = i_i.to(tl.int64) * tl.num_programs(1) + i_h
    else:
        i_table = i_h.to(tl.int64) * tl.num_programs(0) + i_i
    row = tl.load(item_row_ptr + i_i)
    position = tl.load(item_position_ptr + i_i)
    last = position
    if not ONE:
        last = position + tl.load(item_query_len_ptr + i_i) - 1
    sinks, kept, window_start, total = list_bounds(
        position, last, first_unit, window, refresh, k, share_bits, max_units, UNIT
    )
    total = tl.where(row < 0, 0, total)
    start = tl.program_id(2) * BLOCK
    if start == 0:
        tl.store(lengths_ptr + i_table, total)
        tl.store(starts_ptr + i_table + 1, ((i_table + 1) * most).to(tl.int32))
        if i_table == 0:
            tl.store(starts_ptr, 0)
    if start * STEP >= total:
        return
    o_n = start + tl.arange(0, BLOCK)
    p_units = units_ptr + i_i.to(tl.int64) * stride_units_item + i_h * stride_units_head
    # the parts of a list are whole pages, up to its end
    o_pos, m_n = list_positions(o_n * STEP, sinks, kept, window_start, total, p_units, UNIT)
    p_table = block_table_ptr + row.to(tl.int64) * stride_table_row
    b_page = token_offsets(o_pos // STEP, m_n, p_table, per_block, per_page, PAGE // STEP)
    b_page += i_h.to(tl.int64) * per_head
    tl.store(table_ptr + i_table * width + o_n, b_page.to(tl.int32), mask=o_n < width)


@triton.jit(do_not_specialize=["most"])
def rows_fwd_kernel(
    tokens_ptr,  # [rows, T, Hq, D]
    packed_ptr,  # [H, items, most, G, D]
    item_row_ptr,  # [items] int32
    item_query_start_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    most,
    stride_row,
    stride_token,
    stride_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PACK: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies the rows of one (item, KV head) from tokens to the end of its packed ones, or back.

    FP8: packed ones are float8_e4m3fn.
    """
    i_i, i_h, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(item_row_ptr + i_i)
    queries = tl.load(item_query_len_ptr + i_i)
    if (row < 0) | (i_m * BLOCK >= queries * G):
        return
    o_m = i_m * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D_PAD)
    m_m = (o_m < queries * G)[:, None] & (o_d < D)[None, :]
    i_t = tl.load(item_query_start_ptr + i_i).to(tl.int64) + o_m // G
    i_q = (i_h * G + o_m % G).to(tl.int64)
    p_tokens = tokens_ptr + row.to(tl.int64) * stride_row
    p_tokens += (i_t * stride_token + i_q * stride_head)[:, None] + o_d[None, :]
    # the last query must be the last row: the causal mask counts from there
    i_item = i_h.to(tl.int64) * tl.num_programs(0) + i_i
    i_p = (i_item * most + most - queries) * G + o_m
    p_packed = packed_ptr + i_p[:, None] * D + o_d[None, :]
    if PACK:
        b_q = tl.load(p_tokens, mask=m_m)
        if FP8:
            b_q = fp8_of(b_q.to(tl.float32)).to(tl.float8e4nv)
        tl.store(p_packed, b_q, mask=m_m)
    else:
        tl.store(p_tokens, tl.load(p_packed, mask=m_m), mask=m_m)


def step_of(budget: Budget, page: int) -> int:
    """Tokens of a page of the tables: they divide units and the blocks of the cache alike."""
    return math.gcd(budget.unit, page, MAX_STEP)


def page_strides(cache: torch.Tensor, step: int) -> tuple[int, tuple[int, int, int], int]:
    """How ``cache`` [num_blocks, H, page, D], of any strides, lies in pages of ``step`` tokens.

    Returns:
        Elements from one page to the next (pages may overlap); the pages from one block, one KV
        head, and one page of a head to the next; and how many there are.
    """
    sizes = (*cache.shape[:2], cache.shape[2] // step)
    strides = (*cache.stride()[:2], cache.stride(2) * step)
    # a size of 1 may have any stride
    block, head, page = (s if n > 1 else 0 for n, s in zip(sizes, strides, strict=True))
    apart = math.gcd(block, head, page) or cache.shape[3]
    per = (block // apart, head // apart, page // apart)
    return apart, per, 1 + sum((n - 1) * pages for n, pages in zip(sizes, per, strict=True))


def pages_of(cache: torch.Tensor, step: int) -> torch.Tensor:
    """``cache`` [num_blocks, H, page, D] as pages of one KV head: [pages, step, 1, D], a view."""
    apart, _, count = page_strides(cache, step)
    head_dim = cache.shape[3]
    return cache.as_strided((count, step, 1, head_dim), (apart, cache.stride(2), head_dim, 1))


def fits(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> tuple[bool, str]:
    """Whether FlashAttention-3 can attend over the lists of a call, and why not.

    Beside an fp8 cache queries and probabilities are rounded to fp8, too: its products take no
    other operands.

    Args:
        query: [..., D]; key_cache, value_cache: [num_blocks, H, page, D], or a packed cache twice;
            gates, budget: as decode's and prefill's.
    """
    function, reason = compat.flash_attention_3()
    if function is None:
        return False, reason
    if query.dtype not in FLOATS:
        return False, f"query is {query.dtype}: FlashAttention-3 takes {FLOATS}"
    if key_cache.dtype not in (query.dtype, FP8):
        return False, f"the cache is {key_cache.dtype}: one of the query's dtype or {FP8} will do"
    if gates is not None:
        return False, "gates are given: FlashAttention-3 weighs no values"
    head_dim, size = query.shape[-1], key_cache.element_size()
    multiple = ALIGNMENT // size
    if head_dim > MAX_HEAD_DIM or head_dim % multiple:
        return False, (
            f"head_dim is {head_dim}: it must be a multiple of {multiple}, {MAX_HEAD_DIM} at most"
        )
    step = step_of(budget, key_cache.shape[2])
    found = []
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        apart, per, count = page_strides(cache, step)
        found.append(per)
        if any(n * size % ALIGNMENT for n in (apart, cache.stride(2))) or (
            cache.data_ptr() % ALIGNMENT
        ):
            return False, f"{name}: tokens must lie a multiple of {ALIGNMENT} bytes apart"
        if count > torch.iinfo(torch.int32).max:
            return False, f"{name} has more pages than int32 can count"
    if found[0] != found[1]:
        return False, "key_cache and value_cache do not lie alike"
    return True, ""


@dataclass(frozen=True)
class Tables:
    """Requests of FlashAttention-3, in the order (KV head, item).

    Attributes:
        table: [H * items, width] int32 page ids; unspecified behind the end of a list.
        lengths: [H * items] int32, tokens of every list, 0 for padding items.
        starts: [H * items + 1] int32: every request has the same number of rows of queries, of
            which its own queries are the last.
        step: tokens of a page.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    step: int


def make_tables(
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    item_query_len: torch.Tensor | None,
    units: torch.Tensor,
    budget: Budget,
    most: int,
) -> Tables:
    """The page tables of all lists, in one launch and without waiting for the device.

    Args:
        item_query_len: queries of every item, None: one, and requests are in the order
            (item, KV head), as decode's queries lie.
        most: rows of queries that every request gets.
        key_cache, block_table, item_row, item_position, units, budget: see prefill.
    """
    items, heads, max_units = units.shape
    page = key_cache.shape[2]
    step = step_of(budget, page)
    longest = (budget.first_unit() + max_units + 1) * budget.unit + budget.window + budget.refresh
    width = triton.cdiv(longest, step)
    table, lengths, starts = (
        torch.empty(size, dtype=torch.int32, device=units.device)
        for size in ((heads * items, width), heads * items, heads * items + 1)
    )
    _, per, _ = page_strides(key_cache, step)
    tables_fwd_kernel[(items, heads, triton.cdiv(width, TABLE_BLOCK))](
        block_table, item_row, item_position, item_row if item_query_len is None else
        item_query_len, units, table, lengths, starts,
        *budget_arguments(budget, units.device), max_units, width, most, *per,
        block_table.stride(0), units.stride(0), units.stride(1),
        PAGE=page_argument(page, block_table.shape[1]), UNIT=budget.unit, STEP=step,
        ONE=item_query_len is None, BLOCK=TABLE_BLOCK, num_warps=4,
    )  # fmt: skip
    return Tables(table, lengths, starts, step)


def move_rows(
    tokens: torch.Tensor,
    packed: torch.Tensor,
    item_row: torch.Tensor,
    item_query_start: torch.Tensor,
    item_query_len: torch.Tensor,
    pack: bool,
) -> None:
    """Copy the items' rows of ``tokens`` into ``packed``, or those of ``packed`` back.

    Args:
        tokens: [rows, T, Hq, D]; packed: [H, items, most, G, D], contiguous, of any float dtype;
            float8_e4m3fn takes numbers as they are, those beyond it as its largest. An item's
            rows are the last ones of its ``most``; what lies before them is neither read nor
            written.
        item_row, item_query_start, item_query_len: see prefill.
        pack: the direction.
    """
    heads, items, most, group, head_dim = packed.shape
    rows_fwd_kernel[(items, heads, triton.cdiv(most * group, ROWS_BLOCK))](
        tokens, packed, item_row, item_query_start, item_query_len, most, *tokens.stride()[:3],
        G=group, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PACK=pack,
        FP8=packed.dtype == FP8, BLOCK=ROWS_BLOCK, num_warps=4,
    )  # fmt: skip


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: Tables,
    refresh: int,
    scale: float,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """FlashAttention-3 over the pages of ``tables``.

    One split and tiles for ``refresh`` queries, however few there are: both would else follow from
    what is in the batch, and with them the last bits of a result.

    Args:
        query: [H * items * most, G, D] of the cache's dtype, last stride 1.
        key_cache, value_cache: see ``make_tables``; refresh: no request has more queries.
        scale: softmax scale; kv_scales: of an fp8 cache.

    Returns:
        Of query's shape, contiguous; bfloat16 if query is float8_e4m3fn, else of its dtype; rows
        that see nothing are unspecified.
    """
    function, reason = compat.flash_attention_3()
    if function is None:
        raise RuntimeError(reason)
    out = query.new_empty(query.shape, dtype=torch.bfloat16 if kv_scales else query.dtype)
    descale = {}
    if kv_scales is not None:
        names, shape = ("q_descale", "k_descale", "v_descale"), (tables.lengths.shape[0], 1)
        scales = (_one(query.device), *kv_scales)
        descale = {n: s.view(1).expand(shape) for n, s in zip(names, scales, strict=True)}
    function(
        query, pages_of(key_cache, tables.step), pages_of(value_cache, tables.step),
        max_seqlen_q=refresh, cu_seqlens_q=tables.starts,
        max_seqlen_k=tables.table.shape[1] * tables.step, seqused_k=tables.lengths,
        block_table=tables.table, softmax_scale=scale, causal=True, out=out, num_splits=1,
        fa_version=3, **descale,
    )  # fmt: skip
    return out


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, device=device)


def tables_case(page: int, unit: int, one: bool) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of ``tables_fwd_kernel``, as ``compile_targets.py`` takes it."""
    constexprs = {
        "PAGE": page, "UNIT": unit, "STEP": math.gcd(unit, page, MAX_STEP), "ONE": one,
        "BLOCK": TABLE_BLOCK,
    }  # fmt: skip
    types = (
        "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32 "
        "i32 i32 i32"
    )
    return tables_fwd_kernel, types, constexprs, {"num_warps": 4}


def rows_case(
    group: int, head_dim: int, pack: bool, packed: str = "bf16"
) -> tuple[Any, str, dict[str, Any], Any]:
    """One variant of ``rows_fwd_kernel``."""
    constexprs = {
        "G": group, "D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "PACK": pack,
        "FP8": packed == "fp8e4nv", "BLOCK": ROWS_BLOCK,
    }  # fmt: skip
    types = f"*bf16 *{packed} *i32 *i32 *i32 i32 i64 i32 i32"
    return rows_fwd_kernel, types, constexprs, {"num_warps": 4}


COMPILE_CASES = [
    *(tables_case(*case) for case in [(16, 1, True), (16, 1, False), (128, 128, False)]),
    *(tables_case(*case) for case in [(0, 1, False), (0, 16, False)]),
    *(of_heads(tables_case(32, 1, one)) for one in (True, False)),
    *(rows_case(*case) for case in [(4, 128, True), (4, 128, False), (7, 80, False)]),
    rows_case(4, 128, True, "fp8e4nv"),
]
