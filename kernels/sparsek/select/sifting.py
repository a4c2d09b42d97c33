"""Device code of selection from more units than fit a tile: most are sifted out first."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsek.kernels.select.device import (
    best_of,
    best_of_tile,
    key_value,
    load_keys,
    load_unit_scores,
    streamed_units,
    write_padding,
    write_whole,
)

WORD = 16  # scores whose outcomes make one word


@triton.jit
def admit(
    o_u,  # [BLOCK / 2] units
    b_key,  # [BLOCK / 2]
    count,  # units in p_room
    floor,
    keep,
    end,
    p_scores,
    p_table,
    stride_block,
    p_room,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Appends units with a key above ``floor`` to ``p_room``, if need be after a clearance.

    Returns:
        how many units are in ``p_room`` now, and the floor.
    """
    b_take = (b_key > floor).to(tl.int32)
    found = tl.sum(b_take, 0)
    if count + found > BLOCK:
        # what one thread wrote, another reads
        tl.debug_barrier()
        count, floor = best_of(
            keep, p_room, count, end, end, p_scores, p_table, stride_block, p_room, PAGE, UNIT,
            POOLING, True, BLOCK,
        )  # fmt: skip
        # of equal scores the earlier ones are kept
        b_take = (b_key > floor).to(tl.int32)
        found = tl.sum(b_take, 0)
    tl.store(p_room + count + tl.cumsum(b_take, 0) - b_take, o_u, mask=b_take == 1)
    return count + found, floor


@triton.jit
def load_blocks(
    o_g,  # [GROUPS]
    whole,
    p_table,
    PAGE: tl.constexpr,
    POOLING: tl.constexpr,
    GROUP: tl.constexpr = WORD,
):
    """Blocks [GROUPS] int32 that hold groups of scores, 0 where nothing is to be read."""
    if POOLING == "none" or PAGE == 0:
        return o_g * 0
    return tl.load(p_table + o_g // (PAGE // GROUP), mask=o_g < whole, other=0)


@triton.jit
def load_groups(
    o_g,  # [GROUPS]
    whole,
    b_block,  # [GROUPS]
    p_scores,
    p_table,
    stride_block,
    PAGE: tl.constexpr,
    POOLING: tl.constexpr,
    GROUP: tl.constexpr = WORD,
):
    """Scores [GROUPS, GROUP] of groups below ``whole``."""
    if POOLING == "none":
        o_score = o_g * GROUP
    elif PAGE == 0:
        o_score = tl.load(p_table).to(tl.int64) * stride_block + o_g * GROUP
    else:
        o_score = b_block.to(tl.int64) * stride_block + o_g % (PAGE // GROUP) * GROUP
    p_group = p_scores + o_score[:, None] + tl.arange(0, GROUP)[None, :]
    # a mask of whole groups leaves loads wide
    return tl.load(p_group, mask=(o_g < whole)[:, None], other=0.0)


@triton.jit
def mark(
    b_z,  # [GROUPS, GROUP]
    o_g,  # [GROUPS]
    lowest,
    whole,
    p_word,
    GROUP: tl.constexpr = WORD,
):
    """Writes a word a group below ``whole``: bit c is set where score c is ``lowest`` or higher."""
    b_bit = tl.full([GROUP], 1, tl.int32) << tl.arange(0, GROUP)
    b_word = tl.sum(tl.where(b_z >= lowest, b_bit[None, :], 0), 1)
    tl.store(p_word + o_g, b_word.to(tl.int16), mask=o_g < whole)


@triton.jit
def sieve(
    lowest,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_room,  # [ROOM] int32, written
    p_words,  # int16, one a group, written
    PAGE: tl.constexpr,
    POOLING: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr = WORD,
):
    """Writes the units of ``fresh``..``end`` whose score is ``lowest`` or higher, ascending.

    No look at scores waits for what others found: that is one bit a score, and written out
    afterwards. Two tiles of scores, and the blocks of the next two, are always on their way.

    Returns:
        how many there are; no more than ROOM are written.
    """
    GROUPS: tl.constexpr = ROOM // GROUP
    first = fresh // GROUP
    last = (end + GROUP - 1) // GROUP
    whole = end // GROUP
    p_word = p_words - first
    if whole < last:
        # the last group does not compete as a whole, and may end where the scores do
        o_c = tl.arange(0, GROUP)
        o_u = whole * GROUP + o_c
        b_tail = load_unit_scores(
            o_u, o_u < end, p_scores, p_table, stride_block, PAGE, 1, POOLING, GROUP
        )
        b_bit = tl.full([GROUP], 1, tl.int32) << o_c
        tail = tl.sum(tl.where((o_u < end) & (b_tail >= lowest), b_bit, 0), 0)
        tl.store(p_word + whole, tail.to(tl.int16))
    at = first
    o_a = first + tl.arange(0, GROUPS)
    o_b = o_a + GROUPS
    b_block = load_blocks(o_a, whole, p_table, PAGE, POOLING)
    b_za = load_groups(o_a, whole, b_block, p_scores, p_table, stride_block, PAGE, POOLING)
    b_block = load_blocks(o_b, whole, p_table, PAGE, POOLING)
    b_zb = load_groups(o_b, whole, b_block, p_scores, p_table, stride_block, PAGE, POOLING)
    b_block_a = load_blocks(o_a + 2 * GROUPS, whole, p_table, PAGE, POOLING)
    b_block_b = load_blocks(o_b + 2 * GROUPS, whole, p_table, PAGE, POOLING)
    while at < whole:
        o_a = at + tl.arange(0, GROUPS)
        mark(b_za, o_a, lowest, whole, p_word)
        o_a += 2 * GROUPS
        b_za = load_groups(o_a, whole, b_block_a, p_scores, p_table, stride_block, PAGE, POOLING)
        b_block_a = load_blocks(o_a + 2 * GROUPS, whole, p_table, PAGE, POOLING)
        o_b = at + GROUPS + tl.arange(0, GROUPS)
        mark(b_zb, o_b, lowest, whole, p_word)
        o_b += 2 * GROUPS
        b_zb = load_groups(o_b, whole, b_block_b, p_scores, p_table, stride_block, PAGE, POOLING)
        b_block_b = load_blocks(o_b + 2 * GROUPS, whole, p_table, PAGE, POOLING)
        at += 2 * GROUPS
    # what one thread wrote, another reads
    tl.debug_barrier()
    count = end * 0
    for start in range(first, last, ROOM // 2):
        o_g = start + tl.arange(0, ROOM // 2)
        b_word = tl.load(p_word + o_g, mask=o_g < last, other=0).to(tl.int32)
        # of the first and the last group, not all compete
        b_below = tl.minimum(tl.maximum(fresh - o_g * GROUP, 0), GROUP)
        b_upto = tl.minimum(tl.maximum(end - o_g * GROUP, 0), GROUP)
        b_one = tl.full([ROOM // 2], 1, tl.int32)
        b_word &= (b_one << b_upto) - (b_one << tl.minimum(b_below, b_upto))
        b_count = b_word - ((b_word >> 1) & 0x5555)
        b_count = (b_count & 0x3333) + ((b_count >> 2) & 0x3333)
        b_count = (b_count + (b_count >> 4)) & 0x0F0F
        b_count = (b_count + (b_count >> 8)) & 0x1F
        o_slot = count + tl.cumsum(b_count, 0) - b_count
        count += tl.sum(b_count, 0)
        for _ in range(0, tl.max(b_count, 0)):
            # the exponent of a power of two is the place of its bit
            b_lowest = (b_word & -b_word).to(tl.float32).to(tl.int32, bitcast=True)
            o_u = o_g * GROUP + (b_lowest >> 23) - 127
            tl.store(p_room + o_slot, o_u, mask=(b_word != 0) & (o_slot < ROOM))
            o_slot += 1
            b_word &= b_word - 1
    tl.debug_barrier()
    return count


@triton.jit
def sift(
    keep,
    length,
    p_list,
    listed,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_room,  # [BLOCK + WORDS] int32, written
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Writes units of a stream to ``p_room``, ascending: among them are the best ``keep``.

    A sample of the stream says which scores cannot be among the best, so that one look at
    the others mostly leaves fewer than BLOCK. Where more are left, all are looked at again, and
    all but the best thrown out on the way; where too few, the sample was not like the rest, and
    it counts no more. ``keep`` is at most BLOCK / 2, and the stream longer than BLOCK.

    Returns:
        how many were written.
    """
    STEP: tl.constexpr = BLOCK // 2
    SIEVED: tl.constexpr = (
        WORDS > 0 and (UNIT == 1 or POOLING == "none") and (POOLING == "none" or PAGE % 16 == 0)
    )
    o_b = tl.arange(0, STEP)
    o_s = o_b * (length // STEP)
    o_u, m_u = streamed_units(o_s, p_list, listed, fresh, end, LISTED)
    _z, b_key = load_keys(o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, STEP)
    # as far from too few as from too many
    aim = tl.sqrt((keep * BLOCK).to(tl.float32)) / length.to(tl.float32)
    rank = tl.maximum((aim * STEP).to(tl.int32), 1)
    lowest, _ = best_of_tile(b_key, rank)
    # only keys above it are candidates
    floor = tl.maximum(lowest, tl.full([], 1, tl.uint32)) - 1
    count = keep * 0
    if SIEVED and listed == 0:
        found = sieve(
            key_value(lowest), fresh, end, p_scores, p_table, stride_block, p_room,
            (p_room + BLOCK).to(tl.pointer_type(tl.int16), bitcast=True), PAGE, POOLING, BLOCK,
        )  # fmt: skip
        floor = tl.where(found < keep, 0, floor).to(tl.uint32)
        count = tl.where(found > BLOCK, 0, found)
    while count < keep:
        count = keep * 0
        if LISTED:
            for start in range(0, listed, STEP):
                # there is nothing behind the list
                o_u, m_u = streamed_units(start + o_b, p_list, listed, end, end, True)
                _z, b_key = load_keys(
                    o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, STEP
                )
                count, floor = admit(
                    o_u, b_key, count, floor, keep, end, p_scores, p_table, stride_block, p_room,
                    PAGE, UNIT, POOLING, BLOCK,
                )  # fmt: skip
        for start in range(fresh, end, STEP):
            o_u = start + o_b
            _z, b_key = load_keys(
                o_u, o_u < end, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, STEP
            )
            count, floor = admit(
                o_u, b_key, count, floor, keep, end, p_scores, p_table, stride_block, p_room, PAGE,
                UNIT, POOLING, BLOCK,
            )  # fmt: skip
        floor = tl.full([], 0, tl.uint32)
    tl.debug_barrier()
    return count


@triton.jit
def fold_best(
    keep,
    low,
    p_list,
    listed,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_room,  # [ROOM + WORDS] int32, written
    p_units,  # [K] int32, written
    max_units,  # K
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The best ``keep`` units of a stream, which holds those of ``low``..``end``; padded with -1.

    A stream longer than ROOM is sifted first; none is longer than BLOCK where ROOM is 0.
    ``p_list`` may be ``p_units``.
    """
    length = listed + end - fresh
    written = keep
    if keep == end - low:
        write_whole(low, keep, p_units, p_units, False, BLOCK)
    elif ROOM == 0 or length <= BLOCK:
        written, _ = best_of(
            keep, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_units, PAGE, UNIT,
            POOLING, LISTED, BLOCK,
        )  # fmt: skip
    else:
        if length > ROOM:
            listed = sift(
                keep, length, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_room,
                PAGE, UNIT, POOLING, LISTED, ROOM, WORDS,
            )  # fmt: skip
            p_list = p_room
            fresh = end
        written, _ = best_of(
            keep, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_units, PAGE, UNIT,
            POOLING, True, ROOM,
        )  # fmt: skip
    write_padding(written, max_units, p_units, p_units, False, BLOCK)
