"""Device code that makes the score of a page from those of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

POOL_CHUNK = tl.constexpr(16)  # tokens of every page that are loaded at once
POOL_STEP = tl.constexpr(1024)  # pages of a context that are pooled at once


@triton.jit
def page_blocks(
    o_u,  # [BLOCK] pages
    m_u,  # [BLOCK]
    p_table,  # [max_blocks] int32
    PAGE: tl.constexpr,
):
    """Blocks [BLOCK] that hold pages, 0 where masked. PAGE: see ``page_argument``."""
    if PAGE == 0:
        return o_u * 0
    return tl.load(p_table + o_u, mask=m_u, other=0)


@triton.jit
def page_chunk(
    o_u,  # [BLOCK] pages
    b_block,  # [BLOCK] from ``page_blocks``
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Where the scores of the first POOL_CHUNK tokens of pages lie [BLOCK, POOL_CHUNK]."""
    if PAGE == 0:
        o_score = tl.load(p_table).to(tl.int64) * stride_block + o_u * UNIT
    else:
        o_score = b_block.to(tl.int64) * stride_block
    return p_scores + o_score[:, None] + tl.arange(0, POOL_CHUNK)[None, :]


@triton.jit
def pool_chunk(
    b_c,  # [BLOCK, POOL_CHUNK] all tokens of pages
    POOLING: tl.constexpr,
):
    """Scores [BLOCK] of pages; as ``pool_pages``."""
    if POOLING == "mean":
        b_z = tl.sum(b_c, 1) / POOL_CHUNK
    else:
        b_z = tl.max(b_c, 1)
        if POOLING == "lse":
            b_shift = tl.where(b_z == float("-inf"), 0.0, b_z)
            # the highest token alone contributes 1
            b_log = tl.log(tl.maximum(tl.sum(tl.exp(b_c - b_shift[:, None]), 1), 1.0))
            b_z = tl.where(b_z == float("-inf"), b_z, b_shift + b_log)
    return b_z


@triton.jit
def pool_pages(
    p_page,  # [BLOCK, POOL_CHUNK] the first tokens of pages
    m_u,  # [BLOCK]
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [BLOCK] of pages, -inf where masked.

    The order of additions within a page is the same wherever this is used.
    """
    o_c = tl.arange(0, POOL_CHUNK)
    if UNIT == POOL_CHUNK:
        b_c = tl.load(p_page, mask=m_u[:, None], other=float("-inf"))
        return pool_chunk(b_c, POOLING)
    # chunks are combined element by element and reduced once, after the loop: a reduction
    # inside trips an assertion of Triton 3.6 (OptimizeThreadLocality)
    if POOLING == "mean":
        b_sum = tl.zeros([BLOCK, POOL_CHUNK], tl.float32)
        for c in range(0, UNIT, POOL_CHUNK):
            m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
            b_sum += tl.load(p_page + c, mask=m_c, other=0.0)  # [BLOCK, CHUNK]
        b_z = tl.where(m_u, tl.sum(b_sum, 1) / UNIT, float("-inf"))
    else:
        b_high = tl.full([BLOCK, POOL_CHUNK], float("-inf"), tl.float32)
        for c in range(0, UNIT, POOL_CHUNK):
            m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
            b_high = tl.maximum(b_high, tl.load(p_page + c, mask=m_c, other=float("-inf")))
        b_z = tl.max(b_high, 1)
        if POOLING == "lse":
            b_shift = tl.where(b_z == float("-inf"), 0.0, b_z)
            b_sum = tl.zeros([BLOCK, POOL_CHUNK], tl.float32)
            for c in range(0, UNIT, POOL_CHUNK):
                m_c = m_u[:, None] & (o_c < UNIT - c)[None, :]
                b_c = tl.load(p_page + c, mask=m_c, other=float("-inf"))
                b_sum += tl.exp(b_c - b_shift[:, None])
            # the highest token alone contributes 1
            b_log = tl.log(tl.maximum(tl.sum(b_sum, 1), 1.0))
            b_z = tl.where(b_z == float("-inf"), b_z, b_shift + b_log)
    return b_z


@triton.jit
def pool_all(
    low,
    end,
    p_scores,  # one head of the score cache
    p_table,
    stride_block,
    p_pooled,  # [end - low] float32, written
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    POOLING: tl.constexpr,
):
    """Writes the scores of the pages ``low``..``end``."""
    o_b = low + tl.arange(0, POOL_STEP)
    if UNIT == POOL_CHUNK:
        # the scores of the next pages, and the blocks of those after them, are on their way
        b_block = page_blocks(o_b, o_b < end, p_table, PAGE)
        p_page = page_chunk(o_b, b_block, p_scores, p_table, stride_block, PAGE, UNIT)
        b_c = tl.load(p_page, mask=(o_b < end)[:, None], other=float("-inf"))
        b_block = page_blocks(o_b + POOL_STEP, o_b + POOL_STEP < end, p_table, PAGE)
        for start in range(0, end - low, POOL_STEP):
            o_u = o_b + start
            o_next = o_u + POOL_STEP
            o_after = o_next + POOL_STEP
            b_now = b_c
            p_page = page_chunk(o_next, b_block, p_scores, p_table, stride_block, PAGE, UNIT)
            b_c = tl.load(p_page, mask=(o_next < end)[:, None], other=float("-inf"))
            b_block = page_blocks(o_after, o_after < end, p_table, PAGE)
            tl.store(p_pooled + o_u - low, pool_chunk(b_now, POOLING), mask=o_u < end)
    else:
        for start in range(0, end - low, POOL_STEP):
            o_u = o_b + start
            b_block = page_blocks(o_u, o_u < end, p_table, PAGE)
            p_page = page_chunk(o_u, b_block, p_scores, p_table, stride_block, PAGE, UNIT)
            b_z = pool_pages(p_page, o_u < end, UNIT, POOLING, POOL_STEP)
            tl.store(p_pooled + o_u - low, b_z, mask=o_u < end)
    # what one thread wrote, another reads
    tl.debug_barrier()
