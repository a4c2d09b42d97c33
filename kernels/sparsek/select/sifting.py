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
from vllm_sparsek.kernels.select.pooling import pool_all

WORD = 16  # scores whose outcomes make one word
SAMPLED = tl.constexpr(8)  # neighbours in a sample
SIEVED_AGAIN = tl.constexpr(3)  # looks that a sample is worth


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
def first_tiles(
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    PAGE: tl.constexpr,
    POOLING: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr = WORD,
):
    """The first two tiles of scores that ``sieve`` looks at, and the blocks of the next two.

    Whoever has something else to do first asks for them before.
    """
    GROUPS: tl.constexpr = ROOM // GROUP
    whole = end // GROUP
    o_a = fresh // GROUP + tl.arange(0, GROUPS)
    o_b = o_a + GROUPS
    b_block_a = load_blocks(o_a, whole, p_table, PAGE, POOLING)
    b_block_b = load_blocks(o_b, whole, p_table, PAGE, POOLING)
    b_za = load_groups(o_a, whole, b_block_a, p_scores, p_table, stride_block, PAGE, POOLING)
    b_zb = load_groups(o_b, whole, b_block_b, p_scores, p_table, stride_block, PAGE, POOLING)
    b_block_a = load_blocks(o_a + 2 * GROUPS, whole, p_table, PAGE, POOLING)
    b_block_b = load_blocks(o_b + 2 * GROUPS, whole, p_table, PAGE, POOLING)
    return b_za, b_zb, b_block_a, b_block_b


@triton.jit
def low_bits(count):
    """int32 whose lowest ``count`` bits, 0 to 32, are set."""
    b_bits = (tl.full(count.shape, 1, tl.int32) << tl.minimum(count, 31)) - 1
    return tl.where(count >= 32, -1, b_bits)


@triton.jit
def bits_set(b_word):
    """How many bits of int32 are set."""
    b_count = b_word - ((b_word >> 1) & 0x55555555)
    b_count = (b_count & 0x33333333) + ((b_count >> 2) & 0x33333333)
    b_count = (b_count + (b_count >> 4)) & 0x0F0F0F0F
    b_count += b_count >> 8
    return (b_count + (b_count >> 16)) & 0x3F


@triton.jit
def sieve(
    lowest,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_room,  # [ROOM] int32, written
    p_words,  # int32, one two groups, written
    b_za,  # these and the next three from ``first_tiles``
    b_zb,
    b_block_a,
    b_block_b,
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
    PAIR: tl.constexpr = 2 * GROUP
    first = fresh // GROUP
    whole = end // GROUP
    p_pair = p_words - fresh // PAIR
    p_word = p_words.to(tl.pointer_type(tl.int16), bitcast=True) - fresh // PAIR * 2
    if whole * GROUP < end:
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
    pairs = (end + PAIR - 1) // PAIR
    for start in range(fresh // PAIR, pairs, ROOM // 2):
        o_g = start + tl.arange(0, ROOM // 2)
        b_word = tl.load(p_pair + o_g, mask=o_g < pairs, other=0)
        # of the first and the last pair, not all compete, and not all was written
        b_below = tl.minimum(tl.maximum(fresh - o_g * PAIR, 0), PAIR)
        b_upto = tl.minimum(tl.maximum(end - o_g * PAIR, 0), PAIR)
        b_word &= low_bits(b_upto) & ~low_bits(b_below)
        b_count = bits_set(b_word)
        o_slot = count + tl.cumsum(b_count, 0) - b_count
        count += tl.sum(b_count, 0)
        for _ in range(0, tl.max(b_count, 0)):
            # the exponent of a power of two is the place of its bit
            b_lowest = (b_word & -b_word).to(tl.float32).to(tl.int32, bitcast=True)
            b_bit = ((b_lowest >> 23) & 0xFF) - 127
            o_u = o_g * PAIR + b_bit
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
    the others mostly leaves fewer than BLOCK. Where more are left, or too few, the sample was not
    like the rest: what is left tells by how much, and another look is taken. In the end all but the
    best are thrown out on the way through the stream. ``keep`` is at most BLOCK / 2, and the
    stream longer than BLOCK.

    Returns:
        how many were written.
    """
    STEP: tl.constexpr = BLOCK // 2
    SIEVED: tl.constexpr = (
        WORDS > 0 and (UNIT == 1 or POOLING == "none") and (POOLING == "none" or PAGE % 16 == 0)
    )
    o_b = tl.arange(0, STEP)
    # a few neighbours at a time: memory does not deliver less
    TOGETHER: tl.constexpr = SAMPLED if STEP >= SAMPLED else 1
    o_s = o_b // TOGETHER * (length // (STEP // TOGETHER)) + o_b % TOGETHER
    o_u, m_u = streamed_units(o_s, p_list, listed, fresh, end, LISTED)
    _z, b_key = load_keys(o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, STEP)
    # as far from too few as from too many; if the sample is large enough, few enough for a tile of
    # half the size
    aim = tl.sqrt((keep * BLOCK).to(tl.float32))
    aim = tl.where(length <= 16 * BLOCK, tl.minimum(aim, 0.4 * BLOCK), aim)
    rank = tl.maximum((aim / length.to(tl.float32) * STEP).to(tl.int32), 1)
    count = keep * 0
    found = keep * 0
    lowest = tl.full([], 0, tl.uint32)
    if SIEVED and listed == 0:
        tries = keep * 0
        while (tries < SIEVED_AGAIN) & ((found < keep) | (found > BLOCK)):
            # on their way while the sample is searched
            b_za, b_zb, b_block_a, b_block_b = first_tiles(
                fresh, end, p_scores, p_table, stride_block, PAGE, POOLING, BLOCK
            )
            lowest, _ = best_of_tile(b_key, rank, rank // 16)
            found = sieve(
                key_value(lowest), fresh, end, p_scores, p_table, stride_block, p_room,
                p_room + BLOCK, b_za, b_zb, b_block_a, b_block_b, PAGE, POOLING, BLOCK,
            )  # fmt: skip
            # what is left tells how far off the sample was
            rank = (rank.to(tl.float32) * aim / tl.maximum(found, 1).to(tl.float32)).to(tl.int32)
            rank = tl.minimum(tl.maximum(rank, 1), STEP)
            tries += 1
        count = tl.where(found > BLOCK, 0, found)
    else:
        lowest, _ = best_of_tile(b_key, rank, rank // 16)
        found = keep
    # only keys above it are candidates
    floor = tl.maximum(lowest, tl.full([], 1, tl.uint32)) - 1
    floor = tl.where(found < keep, 0, floor).to(tl.uint32)
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

    A stream longer than ROOM is sifted first; none is longer than BLOCK where ROOM is 0. Pages are
    all pooled instead, if there are no more of them than WORDS. ``p_list`` may be ``p_units``.
    """
    PAGES: tl.constexpr = UNIT > 1 and POOLING != "none"
    length = listed + end - fresh
    written = keep
    if keep == end - low:
        write_whole(low, keep, p_units, p_units, False, BLOCK)
    elif ROOM == 0 or length <= BLOCK:
        written, _ = best_of(
            keep, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_units, PAGE, UNIT,
            POOLING, LISTED, BLOCK,
        )  # fmt: skip
    elif PAGES and WORDS > 0:
        p_pooled = (p_room + ROOM).to(tl.pointer_type(tl.float32), bitcast=True)
        pool_all(low, end, p_scores, p_table, stride_block, p_pooled, PAGE, UNIT, POOLING)
        written, _ = best_of(
            keep, p_list, 0, low, end, p_pooled - low, p_table, stride_block, p_units, PAGE, UNIT,
            "none", False, WORDS,
        )  # fmt: skip
    else:
        if length > ROOM:
            listed = sift(
                keep, length, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_room,
                PAGE, UNIT, POOLING, LISTED, ROOM, WORDS,
            )  # fmt: skip
            p_list = p_room
            fresh = end
            length = listed
        # what was sifted mostly fits the smaller tile
        if length <= BLOCK:
            written, _ = best_of(
                keep, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_units, PAGE,
                UNIT, POOLING, True, BLOCK,
            )  # fmt: skip
        else:
            written, _ = best_of(
                keep, p_list, listed, fresh, end, p_scores, p_table, stride_block, p_units, PAGE,
                UNIT, POOLING, True, ROOM,
            )  # fmt: skip
    write_padding(written, max_units, p_units, p_units, False, BLOCK)
