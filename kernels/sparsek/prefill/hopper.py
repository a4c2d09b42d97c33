"""Prefill on Hopper: one group of warps fetches a list's keys and values, two others multiply.

Written in Gluon, since Triton neither splits a program's warps by task nor lets them wait for one
another. A program is resident and takes tiles of 128 (query, head) rows in turn: while two groups of
four warps, each with 64 rows, multiply and exponentiate out of step, the third already copies what
they need next, across the end of a tile. Keys and values cross L2 once for 128 rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.compile_targets import of_heads
from vllm_sparsek.kernels.common.device import (
    BUDGET_SCALARS,
    budget_arguments,
    list_bounds,
    of_head,
    page_argument,
    slots_per_block,
)
from vllm_sparsek.kernels.common.validate import compute_capability
from vllm_sparsek.kernels.prefill.triton import list_slots

CAPABILITY = 90

WARPGROUP_ROWS = 64  # of one warpgroup's products
CONSUMERS = 2
BLOCK_M = WARPGROUP_ROWS * CONSUMERS
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # elements: what strides are a multiple of, so that 16 bytes are copied at a time
# threads that copy: each signals a barrier when its copies have arrived
THREADS = gl.constexpr(128)
# registers a thread of those that multiply and of those that copy: 2 x 224 + 56 = 3 x 168
MULTIPLY_REGISTERS = gl.constexpr(224)
COPY_REGISTERS = gl.constexpr(56)

# Triton 3.9 calls it async_load
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def load_item(
    tile,
    items,
    m_tiles,
    item_row_ptr,
    item_position_ptr,
    item_query_start_ptr,
    item_query_len_ptr,
    k,
    share_bits,
):
    """What a tile is about. Neighbours share a head's keys; one head's items begin where the last
    head's second one was, so that no program gets all the short ones."""
    i_m = tile % m_tiles
    i_h = tile // m_tiles // items
    i_i = (tile // m_tiles + i_h) % items
    return (
        i_i,
        i_h,
        i_m,
        gl.load(item_row_ptr + i_i),
        gl.load(item_position_ptr + i_i),
        gl.load(item_query_start_ptr + i_i),
        gl.load(item_query_len_ptr + i_i),
        of_head(k, i_h),
        of_head(share_bits, i_h),
    )


@gluon.jit
def last_place(i, listed, window_start):
    """The last place of its list that the query at position ``i`` sees.

    It sees all before. Queries of a short prompt see some of the sinks alone.
    """
    return gl.where(i >= window_start, listed + i - window_start, i)


@gluon.jit
def copy_rows(
    smem, p, b_slot, stride_token, o_d, full
):
    """Start copying the rows at slots [N] into ``smem`` [N, D]; ``full`` is signalled at the end."""
    p_rows = p + b_slot.to(gl.int64)[:, None] * stride_token + o_d[None, :]
    copy_to_shared(smem, p_rows)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def produce(
    q_ptr, k_ptr, v_ptr, slots_ptr, item, smem, budget, width, strides,
    G: gl.constexpr, D: gl.constexpr, UNIT: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values of this program's tiles, in the order in which they are read."""
    item_row_ptr, item_position_ptr, item_query_start_ptr, item_query_len_ptr = item
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = smem
    items, m_tiles, tiles, first_unit, window, refresh, k, share_bits, max_units = budget
    stride_q_row, stride_q_token, stride_q_head = strides[0], strides[1], strides[2]
    stride_k_head, stride_k_token = strides[3], strides[4]
    stride_v_head, stride_v_token = strides[5], strides[6]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    done = 0  # tiles of queries
    step = 0  # tiles of keys
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_i, i_h, i_m, row, position, query_start, queries, k_h, share_h = load_item(
            tile, items, m_tiles, item_row_ptr, item_position_ptr, item_query_start_ptr,
            item_query_len_ptr, k, share_bits,
        )  # fmt: skip
        if (row >= 0) & (i_m * (ROWS * GROUPS) < queries * G):
            last_query = gl.minimum(queries - 1, (i_m * (ROWS * GROUPS) + ROWS * GROUPS - 1) // G)
            sinks, kept, window_start, total = list_bounds(
                position, position + last_query, first_unit, window, refresh, k_h, share_h,
                max_units, UNIT,
            )  # fmt: skip
            p_slots = slots_ptr + (i_i.to(gl.int64) * (tiles // m_tiles // items) + i_h) * width
            b_slot = gl.load(p_slots + o_n)
            at = done % 2
            mbarrier.wait(q_empty.index(at), (done // 2 + 1) & 1)
            p_q = q_ptr + row.to(gl.int64) * stride_q_row
            for c in gl.static_range(GROUPS):
                o_m = i_m * (ROWS * GROUPS) + c * ROWS + o_r
                o_query = o_m // G
                i_t = query_start.to(gl.int64) + o_query
                o_row = i_t * stride_q_token + (i_h * G + o_m % G).to(gl.int64) * stride_q_head
                copy_to_shared(
                    q_smem.index(at * GROUPS + c), p_q + o_row[:, None] + o_d[None, :],
                    mask=((o_query < queries)[:, None]) & (o_d < D)[None, :],
                )  # fmt: skip
            async_copy.mbarrier_arrive(q_full.index(at), increment_count=False)
            done += 1
            p_k = k_ptr + i_h.to(gl.int64) * stride_k_head
            p_v = v_ptr + i_h.to(gl.int64) * stride_v_head
            steps = last_place(position + last_query, sinks + kept * UNIT, window_start)
            steps = steps // BLOCK_N + 1
            for j in range(steps):
                stage = step % STAGES
                free = (step // STAGES + 1) & 1
                mbarrier.wait(k_empty.index(stage), free)
                copy_rows(k_smem.index(stage), p_k, b_slot, stride_k_token, o_d, k_full.index(stage))
                mbarrier.wait(v_empty.index(stage), free)
                copy_rows(v_smem.index(stage), p_v, b_slot, stride_v_token, o_d, v_full.index(stage))
                step += 1
                # of the next tile of keys; the last is read again where there is none
                b_slot = gl.load(p_slots + gl.minimum(j + 1, steps - 1) * BLOCK_N + o_n)


@gluon.jit
def softmax_of(
    b_s,  # [M, N] products
    b_m,  # [M] running maximum, times scale_log2
    b_l,  # [M]
    scale_log2,
):
    """One step of the running softmax: weights, the correction of earlier sums, maximum, sum."""
    b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
    # a row that has seen nothing keeps -inf, and -inf - -inf is nan
    b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale_log2 - b_safe[:, None])
    b_alpha = gl.exp2(b_m - b_safe)
    return b_p, b_alpha, b_new, b_l * b_alpha + gl.sum(b_p, 1)


@gluon.jit
def attend_steps(
    first, end, step, b_last, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    b_p, b_m, b_l, b_acc, b_zero, scale_log2,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles ``first``..``end`` of keys: scores of one while values of the one before are summed."""
    for j in range(first, end):
        stage, before = step % STAGES, (step + STAGES - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        fence_async_shared()
        b_s = warpgroup_mma(
            q, k_smem.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        fence_async_shared()
        b_sum = warpgroup_mma(b_p, v_smem.index(before), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            o_n = j * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
            b_s = gl.where(o_n[None, :] <= b_last[:, None], b_s, float("-inf"))
        b_weights, b_alpha, b_m, b_l = softmax_of(b_s, b_m, b_l, scale_log2)
        b_acc, b_p = warpgroup_mma_wait(0, deps=(b_sum, b_p))
        mbarrier.arrive(v_empty.index(before))
        b_a = gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))
        b_acc = b_acc * b_a[:, None]
        b_p = gl.convert_layout(b_weights.to(b_p.dtype), P_LAYOUT)
        step += 1
    return step, b_p, b_m, b_l, b_acc


@gluon.jit
def consume(
    out_ptr, item, smem, scale_log2, budget, stride_out,
    C: gl.constexpr, G: gl.constexpr, D: gl.constexpr, UNIT: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Rows C * ROWS on of every tile: attention over the list, and the result."""
    item_row_ptr, item_position_ptr, item_query_start_ptr, item_query_len_ptr = item
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = smem
    items, m_tiles, tiles, first_unit, window, refresh, k, share_bits, max_units = budget
    stride_out_row, stride_out_token, stride_out_head = stride_out
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    done = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_i, i_h, i_m, row, position, query_start, queries, k_h, share_h = load_item(
            tile, items, m_tiles, item_row_ptr, item_position_ptr, item_query_start_ptr,
            item_query_len_ptr, k, share_bits,
        )  # fmt: skip
        if (row >= 0) & (i_m * (ROWS * GROUPS) < queries * G):
            last_query = gl.minimum(queries - 1, (i_m * (ROWS * GROUPS) + ROWS * GROUPS - 1) // G)
            sinks, kept, window_start, total = list_bounds(
                position, position + last_query, first_unit, window, refresh, k_h, share_h,
                max_units, UNIT,
            )  # fmt: skip
            listed = sinks + kept * UNIT
            steps = last_place(position + last_query, listed, window_start) // BLOCK_N + 1
            # this warpgroup's own queries
            low = i_m * (ROWS * GROUPS) + C * ROWS
            o_query = (low + o_r) // G
            b_last = last_place(position + o_query, listed, window_start)
            first = gl.minimum(low // G, queries - 1)
            last = gl.minimum((low + ROWS - 1) // G, queries - 1)
            plain = (last_place(position + first, listed, window_start) + 1) // BLOCK_N
            own = last_place(position + last, listed, window_start) // BLOCK_N + 1

            at = done % 2
            mbarrier.wait(q_full.index(at), (done // 2) & 1)
            fence_async_shared()
            q = q_smem.index(at * GROUPS + C)
            # the first tile of keys: it is masked in any case
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            b_s = warpgroup_mma(
                q, k_smem.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True
            )
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(k_empty.index(stage))
            o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            b_s = gl.where(o_n[None, :] <= b_last[:, None], b_s, float("-inf"))
            b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
            b_l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
            b_w, b_alpha, b_m, b_l = softmax_of(b_s, b_m, b_l, scale_log2)
            b_p = gl.convert_layout(b_w.to(dtype), p_layout)
            b_acc = gl.zeros([ROWS, D], gl.float32, o_layout)
            step += 1
            middle = gl.maximum(1, gl.minimum(plain, own))
            step, b_p, b_m, b_l, b_acc = attend_steps(
                1, middle, step, b_last, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                b_p, b_m, b_l, b_acc, b_zero, scale_log2, False, BLOCK_N, STAGES, s_layout, p_layout,
            )  # fmt: skip
            step, b_p, b_m, b_l, b_acc = attend_steps(
                middle, own, step, b_last, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                b_p, b_m, b_l, b_acc, b_zero, scale_log2, True, BLOCK_N, STAGES, s_layout, p_layout,
            )  # fmt: skip
            mbarrier.arrive(q_empty.index(at))
            done += 1
            before = (step + STAGES - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
            fence_async_shared()
            b_sum = warpgroup_mma(b_p, v_smem.index(before), b_acc, is_async=True)
            b_acc, b_p = warpgroup_mma_wait(0, deps=(b_sum, b_p))
            mbarrier.arrive(v_empty.index(before))
            # tiles that only later rows of the program's tile see
            for _ in range(own, steps):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage))
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage))
                step += 1

            b_l = gl.convert_layout(b_l, gl.SliceLayout(1, o_layout))
            b_out = gl.convert_layout((b_acc * (1 / b_l)[:, None]).to(dtype), out_layout)
            o_m = low + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
            o_d = gl.arange(0, D, gl.SliceLayout(0, out_layout))
            i_t = query_start.to(gl.int64) + o_m // G
            o_out = i_t * stride_out_token + (i_h * G + o_m % G).to(gl.int64) * stride_out_head
            p_out = out_ptr + row.to(gl.int64) * stride_out_row + o_out[:, None] + o_d[None, :]
            gl.store(p_out, b_out, mask=((o_m // G < queries)[:, None]) & (o_d < D)[None, :])


@gluon.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "width", "items", "m_tiles", "tiles"])
def prefill_hopper_fwd_kernel(
    q_ptr,  # [rows, T, Hq, D]
    k_ptr,  # [num_blocks, H, page, D]
    v_ptr,  # [num_blocks, H, page, D]
    slots_ptr,  # [items, H, width] int32
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32, position of the first query
    item_query_start_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    out_ptr,  # [rows, T, Hq, D]
    scale_log2,  # softmax scale * log2(e)
    items,
    m_tiles,  # tiles of rows an item may have
    tiles,  # items * H * m_tiles
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    width,
    stride_q_row,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_k_token,
    stride_v_head,
    stride_v_token,
    stride_out_row,
    stride_out_token,
    stride_out_head,
    G: gl.constexpr,
    D: gl.constexpr,
    UNIT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Resident programs over all tiles of ROWS * GROUPS (query, head) pairs; see the module."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [2 * GROUPS, ROWS, D], shared)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=THREADS)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=THREADS)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=THREADS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    item = (item_row_ptr, item_position_ptr, item_query_start_ptr, item_query_len_ptr)
    smem = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    budget = (items, m_tiles, tiles, first_unit, window, refresh, k, share_bits, max_units)
    stride_out = (stride_out_row, stride_out_token, stride_out_head)
    strides = (
        stride_q_row, stride_q_token, stride_q_head, stride_k_head, stride_k_token, stride_v_head,
        stride_v_token,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_ptr, item, smem, scale_log2, budget, stride_out,
                    0, G, D, UNIT, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
            (
                consume,
                (
                    out_ptr, item, smem, scale_log2, budget, stride_out,
                    1, G, D, UNIT, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
            (
                produce,
                (
                    q_ptr, k_ptr, v_ptr, slots_ptr, item, smem, budget, width, strides,
                    G, D, UNIT, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
        ],
        [4, 4],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def tile_sizes(head_dim: int) -> dict[str, int]:
    """Tile choices from shapes alone: a query's result must not depend on the batch."""
    return {"BLOCK_N": 128, "STAGES": 256 // head_dim}


def fits(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> tuple[bool, str]:
    """Whether this kernel can attend over the lists of a call, and why not.

    Args:
        query: [..., D]; key_cache, value_cache: [num_blocks, H, page, D]; gates, budget: as
            prefill's.
    """
    if query.device.type != "cuda" or compute_capability(query.device) != CAPABILITY:
        return False, f"it runs on GPUs of compute capability 9.0, not on {query.device}"
    if query.dtype not in DTYPES:
        return False, f"query is {query.dtype}: it takes {DTYPES}"
    if key_cache.dtype != query.dtype:
        return False, f"the cache is {key_cache.dtype}: only one of the query's dtype will do"
    if gates is not None:
        return False, "gates are given: it weighs no values"
    if query.shape[-1] not in HEAD_DIMS:
        return False, f"head_dim is {query.shape[-1]}: it must be one of {HEAD_DIMS}"
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.data_ptr() % 16 or any(s % ALIGNMENT for s in tensor.stride()[:-1]):
            return False, f"{name}: rows must lie a multiple of {ALIGNMENT} elements apart"
    if slots_per_block(key_cache) is None or (
        slots_per_block(key_cache) != slots_per_block(value_cache)
    ):
        return False, "blocks of the cache must lie a whole number of tokens apart"
    return True, ""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs are resident on ``device``: one has a multiprocessor for itself."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    """See ``reference.prefill``; ``fits`` says for which arguments."""
    items = item_row.shape[0]
    if items == 0:
        return
    tokens, query_heads, head_dim = query.shape[1:]
    heads, page = key_cache.shape[1:3]
    group = query_heads // heads
    slots = list_slots(
        block_table, item_row, item_position, item_query_len, units, budget,
        page_argument(page, block_table.shape[1]), slots_per_block(key_cache) or 0,
    )  # fmt: skip
    # no item can have more queries than the batch has tokens
    m_tiles = triton.cdiv(min(budget.refresh, tokens) * group, BLOCK_M)
    tiles = items * heads * m_tiles
    prefill_hopper_fwd_kernel[(min(tiles, multiprocessors(query.device)),)](
        query, key_cache, value_cache, slots, item_row, item_position, item_query_start,
        item_query_len, out, scale * math.log2(math.e), items, m_tiles, tiles,
        *budget_arguments(budget, query.device), units.shape[2], slots.shape[2],
        *query.stride()[:3], *key_cache.stride()[1:3], *value_cache.stride()[1:3],
        *out.stride()[:3],
        G=group, D=head_dim, UNIT=budget.unit, ROWS=WARPGROUP_ROWS, GROUPS=CONSUMERS,
        **tile_sizes(head_dim), num_warps=4,
    )  # fmt: skip


_TYPES = (
    "*{0} *{0} *{0} *i32 *i32 *i32 *i32 *i32 *{0} fp32 i32 i32 i32 i32 i32 i32 i32 i64 i32 i32 "
    "i64 i32 i32 i64 i32 i64 i32 i64 i32 i32"
)


def compile_case(
    dtype: str, group: int, head_dim: int, unit: int
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """One variant of the kernel, as ``common/compile_targets.py`` takes it."""
    constexprs = {
        "G": group, "D": head_dim, "UNIT": unit, "ROWS": WARPGROUP_ROWS, "GROUPS": CONSUMERS,
        **tile_sizes(head_dim),
    }  # fmt: skip
    return prefill_hopper_fwd_kernel, _TYPES.format(dtype), constexprs, {"num_warps": 4}


COMPILE_CASES = [
    compile_case("bf16", 4, 128, 1),
    compile_case("fp16", 1, 128, 16),
    compile_case("fp16", 3, 64, 1),
    of_heads(compile_case("bf16", 8, 128, 1)),
]
