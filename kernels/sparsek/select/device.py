"""Device code of selection: scores of units, their order, and the best of those that fit a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsek.kernels.select.pooling import page_blocks, page_chunk, pool_pages

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

    PAGE: see ``page_argument``. POOLING "none": ``p_scores`` are scores of units, in the order
    of the context.
    """
    if POOLING == "none":
        b_z = tl.load(p_scores + o_u, mask=m_u, other=float("-inf"))
    elif UNIT == 1:
        if PAGE == 0:
            o_score = tl.load(p_table).to(tl.int64) * stride_block + o_u
        else:
            b_block = tl.load(p_table + o_u // PAGE, mask=m_u, other=0).to(tl.int64)
            o_score = b_block * stride_block + o_u % PAGE
        b_z = tl.load(p_scores + o_score, mask=m_u, other=float("-inf"))
    else:
        b_block = page_blocks(o_u, m_u, p_table, PAGE)
        p_page = page_chunk(o_u, b_block, p_scores, p_table, stride_block, PAGE, UNIT)
        b_z = pool_pages(p_page, m_u, UNIT, POOLING, BLOCK)
    return tl.where(b_z == 0.0, 0.0, b_z)


@triton.jit
def streamed_units(o_s, p_list, listed, fresh, end, LISTED: tl.constexpr):
    """Units [BLOCK] at places ``o_s`` of a stream, ascending, and which of them exist [BLOCK].

    The stream is ``listed`` units of a list, which may have holes (-1), and after them the units
    from ``fresh`` to ``end``.
    """
    o_u = fresh + o_s - listed
    if LISTED:
        o_u = tl.where(o_s < listed, tl.load(p_list + o_s, mask=o_s < listed, other=0), o_u)
    return o_u, (o_u >= 0) & (o_u < end)


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


@triton.jit
def narrow(b_count, need, prefix, known, shift):
    """Fix the byte at ``shift`` of the key of rank ``need`` among those that match ``prefix``.

    Args:
        b_count: [256] how many of them have which byte.

    Returns:
        rank among the keys with that byte, prefix and mask of the bytes known, next shift.
    """
    b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)  # [256] keys in higher bins
    m_bin = (b_above < need) & (b_above + b_count >= need)
    digit = tl.sum(tl.where(m_bin, tl.arange(0, 256), 0), 0)
    need -= tl.sum(tl.where(m_bin, b_above, 0), 0)
    prefix = prefix | (digit.to(tl.uint32) << shift)
    known = known | (tl.full([], 0xFF, tl.uint32) << shift)
    return need, prefix, known, shift - 8


@triton.jit
def take(
    o_u,
    m_u,
    b_z,
    b_key,
    threshold,
    ties,
    written,
    equal_seen,
    keep,
    b_top,
    b_tau,
    p_units,
    p_gates,
    SOFT: tl.constexpr,
):
    """Write the units of a tile above the threshold and the first ``ties`` equal to it, in order.

    Returns:
        units written and units equal to the threshold so far.
    """
    # one scan for both: units above the threshold in the low half of a number, equal ones in the
    # high half. A tile holds fewer than 2^15 units
    b_one = tl.where(b_key > threshold, 1, 0) + tl.where(b_key == threshold, 1 << 16, 0)
    b_one = tl.where(m_u, b_one, 0)
    b_seen = tl.cumsum(b_one, 0)
    b_equal = equal_seen + (b_seen >> 16)
    m_take = (b_one == 1) | ((b_one > 1) & (b_equal <= ties))
    # the units before this one that are taken, and itself
    b_place = (b_seen & 0xFFFF) + tl.minimum(b_equal, ties) - tl.minimum(equal_seen, ties)
    o_slot = written + b_place - 1
    # the bound only matters if rounding of a pooled score differed between two passes
    m_slot = m_take & (o_slot < keep)
    tl.store(p_units + o_slot, o_u, mask=m_slot)
    if SOFT:
        b_gate = tl.minimum(tl.maximum(b_z - b_top - b_tau, 0.0), 1.0)
        # fewer than keep units have a score: -inf - -inf is nan
        b_gate = tl.where(b_top == float("-inf"), 1.0, b_gate)
        tl.store(p_gates + o_slot, b_gate, mask=m_slot)
    last = tl.sum(b_one, 0)
    equal = equal_seen + (last >> 16)
    taken = (last & 0xFFFF) + tl.minimum(equal, ties) - tl.minimum(equal_seen, ties)
    return written + taken, equal


@triton.jit
def write_whole(low, keep, p_units, p_gates, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the units from ``low`` on: all that there are."""
    for start in range(0, keep, BLOCK):
        o_slot = start + tl.arange(0, BLOCK)
        tl.store(p_units + o_slot, low + o_slot, mask=o_slot < keep)
        if SOFT:
            tl.store(p_gates + o_slot, tl.full([BLOCK], 1.0, tl.float32), mask=o_slot < keep)


@triton.jit
def write_padding(written, max_units, p_units, p_gates, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    """Fill the outputs from ``written`` on."""
    for start in range(written, max_units, BLOCK):
        o_slot = start + tl.arange(0, BLOCK)
        tl.store(p_units + o_slot, tl.full([BLOCK], -1, tl.int32), mask=o_slot < max_units)
        if SOFT:
            tl.store(p_gates + o_slot, tl.zeros([BLOCK], tl.float32), mask=o_slot < max_units)


@triton.jit
def best_of_tile(b_key, keep, slack=0):
    """What separates the ``keep`` highest keys [BLOCK] uint32: a threshold, and the ties to keep.

    Keys above the threshold are kept, and so many of those equal to it; keys of 0 are none. With
    all keys in registers a count costs little, and two at once cost hardly more than one. What is
    left between two keys is cut in three: every other time by the scores, which are spread more
    evenly, else by the keys, which bounds the number of counts. It ends where a count is exact, or
    has no more than ``slack`` too many: then there are no ties to speak of.
    """
    # ``keep`` or more keys reach ``low``; ``above`` keys, fewer than that, reach ``beyond``
    beyond = tl.max(b_key, 0) + 1
    low = tl.minimum(tl.min(tl.where(b_key == 0, 0xFFFFFFFF, b_key), 0), beyond - 1)
    above = keep * 0
    reached = keep - 1
    by_score = keep >= 0
    while (beyond - low > 1) & ((reached < keep) | (reached > keep + slack)):
        third = tl.maximum((beyond - low) // 3, 1)
        first, second = low + third, beyond - third
        lowest, highest = key_value(low), key_value(beyond)
        between = ordered_key(lowest * (2 / 3) + highest * (1 / 3))
        first = tl.where(by_score & (between > low) & (between < beyond), between, first)
        between = ordered_key(lowest * (1 / 3) + highest * (2 / 3))
        second = tl.where(by_score & (between > low) & (between < beyond), between, second)
        first, second = tl.minimum(first, second), tl.maximum(first, second)
        # both counts in one sum: a tile holds fewer than 2^15 keys
        both = tl.sum((b_key >= first).to(tl.int32) + ((b_key >= second).to(tl.int32) << 16), 0)
        at_first, at_second = both & 0xFFFF, both >> 16
        low = tl.where(at_second >= keep, second, tl.where(at_first >= keep, first, low))
        above = tl.where(at_second >= keep, above, tl.where(at_first >= keep, at_second, at_first))
        beyond = tl.where(at_second >= keep, beyond, tl.where(at_first >= keep, second, first))
        reached = tl.where(at_second >= keep, at_second, at_first)
        by_score = by_score == 0
    # an exact count keeps the keys that equal the threshold, all of them
    return low, tl.where(reached == keep, keep, keep - above)


@triton.jit
def load_keys(
    o_u,  # [BLOCK] units
    m_u,  # [BLOCK]
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of units and their ``ordered_key``, 0 where masked: no score has that key."""
    b_z = load_unit_scores(o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK)
    return b_z, tl.where(m_u, ordered_key(b_z), 0)


@triton.jit
def best_of(
    keep,
    p_list,
    listed,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_units,  # written
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the best ``keep`` units of a stream that fits into a tile, ascending.

    ``p_list`` may be ``p_units``: no unit moves up, and cumsum is a barrier between all reads and
    any write.

    Returns:
        how many were written, and the lowest key among them.
    """
    o_b = tl.arange(0, BLOCK)
    o_u, m_u = streamed_units(o_b, p_list, listed, fresh, end, LISTED)
    b_z, b_key = load_keys(o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK)
    wanted = tl.minimum(keep, tl.sum(m_u.to(tl.int32), 0))
    threshold, ties = best_of_tile(b_key, wanted)
    take(o_u, m_u, b_z, b_key, threshold, ties, 0, 0, wanted, 0.0, 0.0, p_units, p_units, False)
    return wanted, threshold


@triton.jit
def radix_best(
    keep,
    low,
    p_list,
    listed,
    fresh,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_units,  # [K] int32, written
    p_gates,  # [K] float32, written (SOFT)
    max_units,  # K
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    SOFT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``fold_best`` for any ``keep``, from a stream alone, which may be ``p_units``.

    Counts by radix, a byte a pass over the stream, and then compacts it in order.
    """
    o_b = tl.arange(0, BLOCK)
    length = listed + end - fresh
    # after every pass ``threshold`` holds one more byte of the keep-th largest key
    threshold = tl.full([], 0, tl.uint32)
    known = tl.full([], 0, tl.uint32)
    shift = tl.full([], 24, tl.uint32)
    need = keep
    written = keep * 0
    equal_seen = keep * 0
    b_tau = tl.full([], 0.0, tl.float32)
    if keep == end - low:
        write_whole(low, keep, p_units, p_gates, SOFT, BLOCK)
        written = keep
    else:
        for _ in range(4):
            b_count = tl.zeros([256], tl.int32)
            for start in range(0, length, BLOCK):
                o_u, m_u = streamed_units(start + o_b, p_list, listed, fresh, end, LISTED)
                b_z = load_unit_scores(
                    o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK
                )
                b_key = ordered_key(b_z)
                b_digit = ((b_key >> shift) & 0xFF).to(tl.int32)
                b_count += tl.histogram(b_digit, 256, mask=m_u & ((b_key & known) == threshold))
            need, threshold, known, shift = narrow(b_count, need, threshold, known, shift)
        b_top = key_value(threshold)
        if SOFT:
            b_tau = soft_threshold(
                b_top, keep, low, end, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK
            )
        # in place if p_list is p_units: no unit moves up, and cumsum is a barrier
        for start in range(0, length, BLOCK):
            o_u, m_u = streamed_units(start + o_b, p_list, listed, fresh, end, LISTED)
            b_z = load_unit_scores(
                o_u, m_u, p_scores, p_table, stride_block, PAGE, UNIT, POOLING, BLOCK
            )
            written, equal_seen = take(
                o_u, m_u, b_z, ordered_key(b_z), threshold, need, written, equal_seen, keep, b_top,
                b_tau, p_units, p_gates, SOFT,
            )  # fmt: skip
    write_padding(tl.minimum(written, keep), max_units, p_units, p_gates, SOFT, BLOCK)
