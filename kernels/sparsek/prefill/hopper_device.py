"""Device code of prefill on Hopper, in Gluon: warps that copy, and two groups that multiply.

A program is resident and takes tiles of queries in turn. Four warps copy what a tile reads into
shared memory, a few tiles of keys ahead and on into the next tile of queries, and store its
results; two groups of four, each with half of the rows, multiply and exponentiate, one mostly while
the other does the other. What a tile is about they find in a plan that ``tiles_fwd_kernel`` made,
so that none of them divides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_sparsek.kernels.common.device import BUDGET_SCALARS, list_bounds

FIELDS = gl.constexpr(16)  # int32 numbers that describe a tile; 12 are in use
# threads that copy: each signals a barrier when its copies have arrived
THREADS = gl.constexpr(128)
# registers a thread of those that multiply and of those that copy: 2 x 216 + 72 = 3 x 168
MULTIPLY_REGISTERS = gl.constexpr(216)
COPY_REGISTERS = gl.constexpr(72)

# Triton 3.9 calls it async_load
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@triton.jit
def last_place(i, listed, window_start):
    """The last place of its list that the query at position ``i`` sees.

    It sees all before. Queries of a short prompt see some of the sinks alone.
    """
    return tl.where(i >= window_start, listed + i - window_start, i)


@triton.jit(do_not_specialize=[*BUDGET_SCALARS, "max_units", "items", "m_tiles", "tiles"])
def tiles_fwd_kernel(
    item_row_ptr,  # [items] int32
    item_position_ptr,  # [items] int32
    item_query_start_ptr,  # [items] int32
    item_query_len_ptr,  # [items] int32
    plan_ptr,  # [tiles, FIELDS] int32
    items,
    m_tiles,  # tiles of rows an item may have
    tiles,  # items * H * m_tiles
    first_unit,
    window,
    refresh,
    k,
    share_bits,
    max_units,  # K
    G: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What every tile of queries is about, so that no group of warps need divide for it.

    The item, KV head and first row; the item's row, position, first query and queries; of its list
    the sinks, the tokens of kept units, where the window begins and the last token; and how many
    tiles of keys it reads, 0 if it has no queries.

    Neighbours share a head's keys. Items and tiles of their rows move on by one from head to head,
    so that no program gets all the short ones.
    """
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < tiles
    i_h = o_t // m_tiles // items
    i_i = (o_t // m_tiles + i_h) % items
    low = (o_t + i_h) % m_tiles * BLOCK_M
    if k.dtype.is_ptr():
        k = tl.load(k + i_h, mask=m_t, other=0)
        share_bits = tl.load(share_bits + i_h, mask=m_t, other=0)
    row = tl.load(item_row_ptr + i_i)
    position = tl.load(item_position_ptr + i_i)
    queries = tl.load(item_query_len_ptr + i_i)
    last = position + tl.minimum(queries - 1, (low + BLOCK_M - 1) // G)
    sinks, kept, window_start, _ = list_bounds(
        position, last, first_unit, window, refresh, k, share_bits, max_units, UNIT
    )
    steps = last_place(last, sinks + kept * UNIT, window_start) // BLOCK_N + 1
    p_plan = plan_ptr + o_t * FIELDS
    tl.store(p_plan, i_i, mask=m_t)
    tl.store(p_plan + 1, i_h, mask=m_t)
    tl.store(p_plan + 2, low, mask=m_t)
    tl.store(p_plan + 3, row, mask=m_t)
    tl.store(p_plan + 4, position, mask=m_t)
    tl.store(p_plan + 5, tl.load(item_query_start_ptr + i_i), mask=m_t)
    tl.store(p_plan + 6, queries, mask=m_t)
    tl.store(p_plan + 7, sinks, mask=m_t)
    tl.store(p_plan + 8, kept * UNIT, mask=m_t)
    tl.store(p_plan + 9, window_start, mask=m_t)
    tl.store(p_plan + 10, last, mask=m_t)
    tl.store(p_plan + 11, tl.where((row >= 0) & (low < queries * G), steps, 0), mask=m_t)


@gluon.jit
def load_copies(plan_ptr, tile, tiles):
    """Of a tile, what those who copy need."""
    p = plan_ptr + gl.minimum(tile, tiles - 1) * FIELDS
    steps = gl.where(tile < tiles, gl.load(p + 11), 0)
    return (
        gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3), gl.load(p + 5), gl.load(p + 6),
        gl.load(p + 7), gl.load(p + 8), gl.load(p + 9), gl.load(p + 10), steps,
    )  # fmt: skip


@gluon.jit
def load_products(plan_ptr, tile, tiles):
    """Of a tile, what those who multiply need."""
    p = plan_ptr + gl.minimum(tile, tiles - 1) * FIELDS
    steps = gl.where(tile < tiles, gl.load(p + 11), 0)
    return (
        gl.load(p + 2), gl.load(p + 4), gl.load(p + 6), gl.load(p + 7), gl.load(p + 8),
        gl.load(p + 9), steps,
    )  # fmt: skip


@gluon.jit
def unit_at(o_n, sinks, listed, p_units, UNIT: gl.constexpr):
    """The kept units [N] at places ``o_n`` of a list, 0 where there is none."""
    o_kept = o_n - sinks
    return gl.load(p_units + o_kept // UNIT, mask=(o_kept >= 0) & (o_kept < listed), other=0)


@gluon.jit
def position_at(o_n, b_unit, sinks, listed, window_start, last, UNIT: gl.constexpr):
    """Token positions [N] at places ``o_n``; behind the end of the list, that of its last token."""
    o_kept = o_n - sinks
    o_pos = gl.where(o_kept < listed, b_unit * UNIT + o_kept % UNIT, window_start + o_kept - listed)
    return gl.minimum(gl.where(o_kept < 0, o_n, o_pos), last)


@gluon.jit
def block_at(o_pos, p_table, PAGE: gl.constexpr):
    """Blocks [N] of tokens; PAGE 0: a row is one block."""
    if PAGE == 0:
        return gl.load(p_table + 0 * o_pos)
    else:
        return gl.load(p_table + o_pos // PAGE)


@gluon.jit
def offsets_of(o_m, i_h, query_start, stride_token, stride_head, G: gl.constexpr):
    """Offsets [M] int64 of (query, head) pairs ``o_m`` of an item and KV head, within their row."""
    i_t = query_start.to(gl.int64) + o_m // G
    return i_t * stride_token + (i_h * G + o_m % G).to(gl.int64) * stride_head


@gluon.jit
def store_results(
    out_ptr, held, q_smem, at, stride_out, LAYOUT: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Stores the results of a tile that lie in place ``at``; none of a tile without queries."""
    row, i_h, low, query_start, queries = held
    stride_row, stride_token, stride_head = stride_out
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    p_out = out_ptr + row.to(gl.int64) * stride_row
    for c in gl.static_range(GROUPS):
        o_m = low + c * ROWS + o_r
        o_out = offsets_of(o_m, i_h, query_start, stride_token, stride_head, G)
        b_out = q_smem.index(at * GROUPS + c).load(LAYOUT)
        m_out = ((o_m // G < queries)[:, None]) & (o_d < D)[None, :]
        gl.store(p_out + o_out[:, None] + o_d[None, :], b_out, mask=m_out)


@gluon.jit
def produce(
    q_ptr, k_ptr, v_ptr, table_ptr, units_ptr, plan_ptr, out_ptr, tiles, smem, lists, strides,
    stride_out, G: gl.constexpr, D: gl.constexpr, UNIT: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values of this program's tiles, in the order in which they are read.

    The values of one tile of keys come with the keys of the next, as they are read. Kept units are
    loaded three tiles of keys ahead and blocks two, those of the next tile of queries when one
    begins and ends. Results lie where a tile's queries lay: they are stored before others come.
    """
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty = smem
    per_block, stride_table_row, stride_units_item, stride_units_head = lists
    stride_q_row, stride_q_token, stride_q_head = strides[0], strides[1], strides[2]
    stride_k_head, stride_v_head, stride_token = strides[3], strides[4], strides[5]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    # one token a thread, until its row is copied by several
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, layout))
    o_n = gl.arange(0, BLOCK_N, flat)
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    apart = gl.num_programs(0)
    first = gl.program_id(0)
    i_i, i_h, low, row, query_start, queries, sinks, listed, window_start, last, steps = (
        load_copies(plan_ptr, first, tiles)
    )
    p_units = units_ptr + i_i.to(gl.int64) * stride_units_item + i_h * stride_units_head
    p_table = table_ptr + gl.maximum(row, 0).to(gl.int64) * stride_table_row
    b_unit_0 = unit_at(o_n, sinks, listed, p_units, UNIT)
    b_unit_1 = unit_at(BLOCK_N + o_n, sinks, listed, p_units, UNIT)
    b_unit_2 = unit_at(2 * BLOCK_N + o_n, sinks, listed, p_units, UNIT)
    o_pos_0 = position_at(o_n, b_unit_0, sinks, listed, window_start, last, UNIT)
    o_pos_1 = position_at(BLOCK_N + o_n, b_unit_1, sinks, listed, window_start, last, UNIT)
    b_block_0 = block_at(o_pos_0, p_table, PAGE)
    b_block_1 = block_at(o_pos_1, p_table, PAGE)
    b_before = gl.zeros([BLOCK_N], gl.int64, flat)
    p_v = v_ptr
    # the last two tiles, the older one first: their results are still to be stored
    older = (0 * row, 0 * i_h, 0 * low, 0 * query_start, 0 * queries)
    # not the same values: what a loop sets to values that it began with is not carried
    newer = (0 * row, 0 * i_h, 0 * low, 0 * query_start, 0 * queries)
    done = 0  # tiles of queries
    step = 0  # tiles of keys
    for tile in range(first, tiles, apart):
        (
            next_i, next_h, next_low, next_row, next_start, next_queries, next_sinks, next_listed,
            next_window, next_last, next_steps,
        ) = load_copies(plan_ptr, tile + apart, tiles)  # fmt: skip
        if steps > 0:
            at = done % 2
            mbarrier.wait(q_empty.index(at), (done // 2 + 1) & 1)
            store_results(
                out_ptr, older, q_smem, at, stride_out, layout, G, D, ROWS, GROUPS
            )  # fmt: skip
            older = newer
            newer = (row, i_h, low, query_start, queries)
            p_q = q_ptr + row.to(gl.int64) * stride_q_row
            for c in gl.static_range(GROUPS):
                o_m = low + c * ROWS + o_r
                o_row = offsets_of(o_m, i_h, query_start, stride_q_token, stride_q_head, G)
                copy_to_shared(
                    q_smem.index(at * GROUPS + c), p_q + o_row[:, None] + o_d[None, :],
                    mask=((o_m // G < queries)[:, None]) & (o_d < D)[None, :],
                )  # fmt: skip
            async_copy.mbarrier_arrive(q_full.index(at), increment_count=False)
            done += 1
        p_next = units_ptr + next_i.to(gl.int64) * stride_units_item + next_h * stride_units_head
        b_next_0 = unit_at(o_n, next_sinks, next_listed, p_next, UNIT)
        b_next_1 = unit_at(BLOCK_N + o_n, next_sinks, next_listed, p_next, UNIT)
        b_next_2 = unit_at(2 * BLOCK_N + o_n, next_sinks, next_listed, p_next, UNIT)
        p_k = k_ptr + i_h.to(gl.int64) * stride_k_head
        for j in range(steps):
            stage = step % STAGES
            # PAGE 0: a position is a place in the row's block
            o_token = o_pos_0 if PAGE == 0 else o_pos_0 % PAGE
            b_offset = (b_block_0 * per_block + o_token).to(gl.int64) * stride_token
            b_rows = gl.convert_layout(b_offset, gl.SliceLayout(1, layout))
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            copy_to_shared(k_smem.index(stage), (p_k + o_d)[None, :] + b_rows[:, None])
            if step > 0:
                b_rows = gl.convert_layout(b_before, gl.SliceLayout(1, layout))
                copy_to_shared(v_smem.index(stage), (p_v + o_d)[None, :] + b_rows[:, None])
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            p_v = v_ptr + i_h.to(gl.int64) * stride_v_head
            b_before = b_offset
            step += 1
            o_pos_0, b_block_0 = o_pos_1, b_block_1
            o_next = (j + 2) * BLOCK_N + o_n
            o_pos_1 = position_at(o_next, b_unit_2, sinks, listed, window_start, last, UNIT)
            b_block_1 = block_at(o_pos_1, p_table, PAGE)
            b_unit_2 = unit_at(o_next + BLOCK_N, sinks, listed, p_units, UNIT)
        i_h, low, steps, row = next_h, next_low, next_steps, next_row
        sinks, listed, window_start, last = next_sinks, next_listed, next_window, next_last
        query_start, queries = next_start, next_queries
        p_units = p_next
        p_table = table_ptr + gl.maximum(row, 0).to(gl.int64) * stride_table_row
        o_pos_0 = position_at(o_n, b_next_0, sinks, listed, window_start, last, UNIT)
        o_pos_1 = position_at(BLOCK_N + o_n, b_next_1, sinks, listed, window_start, last, UNIT)
        b_block_0 = block_at(o_pos_0, p_table, PAGE)
        b_block_1 = block_at(o_pos_1, p_table, PAGE)
        b_unit_2 = b_next_2
    if step > 0:
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
        b_rows = gl.convert_layout(b_before, gl.SliceLayout(1, layout))
        copy_to_shared(v_smem.index(stage), (p_v + o_d)[None, :] + b_rows[:, None])
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    if done > 1:
        mbarrier.wait(q_empty.index(done % 2), (done // 2 + 1) & 1)
        store_results(out_ptr, older, q_smem, done % 2, stride_out, layout, G, D, ROWS, GROUPS)
    if done > 0:
        at = (done - 1) % 2
        mbarrier.wait(q_empty.index(at), ((done - 1) // 2) & 1)
        store_results(out_ptr, newer, q_smem, at, stride_out, layout, G, D, ROWS, GROUPS)


@gluon.jit
def weigh(
    b_s,  # [M, N] products
    b_m,  # [M] running maximum, times scale_log2
    b_l,  # [M, 8] running sums: of every eighth weight, so that threads need not tell each other
    b_acc,  # [M, D]
    scale_log2,
    P_LAYOUT: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """One step of the running softmax.

    Returns:
        weights as the operand of a product, the maximum, and both sums, corrected for it.
    """
    shape: gl.constexpr = [b_s.shape[0], b_s.shape[1] // 8, 8]
    b_high = gl.convert_layout(gl.max(gl.max(b_s.reshape(shape), 1), 1), b_m.type.layout)
    b_new = gl.maximum(b_m, b_high * scale_log2)
    # a row that has seen nothing keeps -inf, and -inf - -inf is nan
    b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = gl.exp2(b_s * scale_log2 - b_safe[:, None])
    b_alpha = gl.exp2(b_m - b_safe)
    b_sum = gl.sum(b_weights.reshape(shape), 1)
    b_of_sums = gl.convert_layout(b_alpha, gl.SliceLayout(1, b_sum.type.layout))
    b_of_acc = gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))
    b_p = gl.convert_layout(b_weights.to(DTYPE), P_LAYOUT)
    return b_p, b_new, b_l * b_of_sums[:, None] + b_sum, b_acc * b_of_acc[:, None]


@gluon.jit
def pass_by(step, steps, full, empty, STAGES: gl.constexpr):
    """Lets ``steps`` tiles of keys go, as they come, from ``step`` on; returns the step after."""
    for _ in range(0, steps):
        stage = step % STAGES
        # not before it is there: the round before may not be over for the others
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage))
        step += 1
    return step


@gluon.jit
def consume(
    plan_ptr, tiles, smem, scale_log2,
    C: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Rows C * ROWS on of every tile: attention over the list, and the result where queries lay.

    A step has scores of a tile of keys. It weighs them, sums the values, and makes the scores of
    the next tile of keys; with a tile's last step, the first of the next tile of queries. While it
    weighs, the other group multiplies. Code is short: it is read again for every tile.
    """
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty = smem
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = q_smem.dtype
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    o_r = gl.arange(0, ROWS, row_layout)
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    apart = gl.num_programs(0)
    tile = gl.program_id(0)
    low, position, queries, sinks, kept, window_start, steps = load_products(plan_ptr, tile, tiles)
    while (tile < tiles) & (steps == 0):
        tile += apart
        low, position, queries, sinks, kept, window_start, steps = load_products(
            plan_ptr, tile, tiles
        )
    done = 0  # tiles of queries
    step = 0  # tiles of keys
    b_s = b_zero
    if tile < tiles:
        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(full.index(0), 0)
        fence_async_shared()
        b_s = warpgroup_mma(
            q_smem.index(C), k_smem.index(0).permute((1, 0)), b_zero, use_acc=False, is_async=False
        )
        mbarrier.arrive(empty.index(0))
        step = 1
    while tile < tiles:
        # what follows
        then = tile + apart
        (
            then_low, then_position, then_queries, then_sinks, then_kept, then_window, then_steps,
        ) = load_products(plan_ptr, then, tiles)  # fmt: skip
        listed = sinks + kept
        # this warpgroup's own queries, the tiles of keys that it reads, and those that all of its
        # queries see
        low += C * ROWS
        b_last = last_place(position + (low + o_r) // G, listed, window_start)
        first_query = position + gl.minimum(low // G, queries - 1)
        last_query = position + gl.minimum((low + ROWS - 1) // G, queries - 1)
        plain = (last_place(first_query, listed, window_start) + 1) // BLOCK_N
        own = last_place(last_query, listed, window_start) // BLOCK_N + 1
        # without queries it only keeps step with the other group
        begin = gl.where(low < queries * G, 0, steps - 1)
        own = gl.where(low < queries * G, own, steps)
        step = pass_by(step, begin, full, empty, STAGES)
        middle = gl.maximum(begin, gl.minimum(plain, own - 1))
        now = done % 2 * GROUPS + C
        q = q_smem.index(now)
        b_m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        b_l = gl.sum(b_zero.reshape([ROWS, BLOCK_N // 8, 8]), 1)
        b_acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        for _ in range(begin, middle):
            b_p, b_m, b_l, b_acc = weigh(b_s, b_m, b_l, b_acc, scale_log2, p_layout, dtype)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            b_sum = warpgroup_mma(b_p, v_smem.index(stage), b_acc, is_async=True)
            b_next = warpgroup_mma(
                q, k_smem.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True
            )
            b_acc, b_s, b_p = warpgroup_mma_wait(0, deps=(b_sum, b_next, b_p))
            mbarrier.arrive(empty.index(stage))
            step += 1
        while (then < tiles) & (then_steps == 0):
            then += apart
            (
                then_low, then_position, then_queries, then_sinks, then_kept, then_window,
                then_steps,
            ) = load_products(plan_ptr, then, tiles)  # fmt: skip
        at = (done + 1) % 2
        for j in range(middle, own):
            b_room = b_last - j * BLOCK_N
            b_s = gl.where(o_n[None, :] <= b_room[:, None], b_s, float("-inf"))
            b_p, b_m, b_l, b_acc = weigh(b_s, b_m, b_l, b_acc, scale_log2, p_layout, dtype)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            b_acc = warpgroup_mma(b_p, v_smem.index(stage), b_acc, is_async=False)
            last = j == own - 1
            # the last values come with keys that only queries of the other group see, or with the
            # first of the next tile
            step = pass_by(step, gl.where(last, steps - own, 0), full, empty, STAGES)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            mbarrier.wait(q_full.index(at), ((done + 1) // 2) & 1, pred=last & (then < tiles))
            fence_async_shared()
            # Behind the last tile nobody reads these. The place of the queries is found in the
            # step: one that is the same in two loops, ptxas of CUDA 12.8 finds in front of the
            # first, even where that is skipped
            b_s = warpgroup_mma(
                q_smem.index(gl.where(last, at * GROUPS + C, now)),
                k_smem.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=False,
            )  # fmt: skip
            mbarrier.arrive(empty.index(stage))
            step += 1
        b_all = gl.convert_layout(gl.sum(b_l, 1), gl.SliceLayout(1, o_layout))
        q.store((b_acc * (1 / b_all)[:, None]).to(dtype))
        mbarrier.arrive(q_empty.index(done % 2))
        done += 1
        tile, low, position, queries = then, then_low, then_position, then_queries
        sinks, kept, window_start, steps = then_sinks, then_kept, then_window, then_steps


@gluon.jit(do_not_specialize=["per_block", "tiles"])
def prefill_hopper_fwd_kernel(
    q_ptr,  # [rows, T, Hq, D]
    k_ptr,  # [num_blocks, H, page, D]
    v_ptr,  # [num_blocks, H, page, D]
    table_ptr,  # [rows, max_blocks] int32
    units_ptr,  # [items, H, K] int32
    plan_ptr,  # [tiles, FIELDS] int32, from ``tiles_fwd_kernel``
    out_ptr,  # [rows, T, Hq, D]
    scale_log2,  # softmax scale * log2(e)
    tiles,
    per_block,  # slots from one block of the cache to the next
    stride_table_row,
    stride_units_item,
    stride_units_head,
    stride_q_row,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_token,  # of keys and values
    stride_out_row,
    stride_out_token,
    stride_out_head,
    G: gl.constexpr,
    D: gl.constexpr,
    UNIT: gl.constexpr,
    PAGE: gl.constexpr,
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
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=THREADS)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=THREADS)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    smem = (q_smem, k_smem, v_smem, q_full, q_empty, full, empty)
    lists = (per_block, stride_table_row, stride_units_item, stride_units_head)
    stride_out = (stride_out_row, stride_out_token, stride_out_head)
    strides = (
        stride_q_row, stride_q_token, stride_q_head, stride_k_head, stride_v_head, stride_token,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                consume,
                (
                    plan_ptr, tiles, smem, scale_log2,
                    0, G, D, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
            (
                consume,
                (
                    plan_ptr, tiles, smem, scale_log2,
                    1, G, D, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
            (
                produce,
                (
                    q_ptr, k_ptr, v_ptr, table_ptr, units_ptr, plan_ptr, out_ptr, tiles, smem,
                    lists, strides, stride_out, G, D, UNIT, PAGE, BLOCK_N, STAGES, ROWS, GROUPS,
                ),
            ),
        ],
        [4, 4],
        [MULTIPLY_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
