"""Triton kernels of score: projection, scatter of token scores, and causal KeyDiff."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WRITE_BLOCK = 256  # (token, head) pairs per program
PROJECT_TOKENS = 32  # tokens per program
PROJECT_OUTPUTS = 16  # outputs per program: the narrowest tile tl.dot takes
PROJECT_STEP = 64  # components of x at a time
KEYDIFF_TILE = 1024  # elements of a page's keys per warp: 32 registers a thread


def keydiff_warps(page_pad: int, head_dim_pad: int) -> int:
    """Warps that hold one page's keys in registers."""
    return min(16, max(4, page_pad * head_dim_pad // KEYDIFF_TILE))


@triton.jit(do_not_specialize=["total"])
def write_scores_fwd_kernel(
    token_scores_ptr,  # [T, H] float32
    slot_mapping_ptr,  # [>= T] int64
    scores_ptr,  # [num_blocks, H, page] float32
    total,  # T * H
    stride_in_token,
    stride_in_head,
    stride_block,
    stride_head,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scatter; one program per BLOCK (token, head) pairs."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < total
    i_t = o // H
    i_h = o % H
    b_slot = tl.load(slot_mapping_ptr + i_t, mask=m, other=-1).to(tl.int64)
    m = m & (b_slot >= 0)
    b_u = tl.load(
        token_scores_ptr + i_t * stride_in_token + i_h * stride_in_head, mask=m, other=0.0
    )
    o_out = b_slot // PAGE * stride_block + i_h * stride_head + b_slot % PAGE
    tl.store(scores_ptr + o_out, b_u, mask=m)


@triton.jit(do_not_specialize=["tokens"])
def project_fwd_kernel(
    x_ptr,  # [T, H, W] float32
    weight_ptr,  # [H, M, W] float32
    bias_ptr,  # [H, M] float32
    out_ptr,  # [T, H, M] float32
    tokens,  # T
    stride_x_token,
    stride_x_head,
    stride_w_head,
    stride_b_head,
    H: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Fixed tiles and one order of additions: a token's result never depends on the others."""
    i_t, i_h, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t = i_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = o_t < tokens
    m_m = o_m < M
    p_x = x_ptr + o_t[:, None] * stride_x_token + i_h.to(tl.int64) * stride_x_head
    p_w = weight_ptr + i_h.to(tl.int64) * stride_w_head + o_m[None, :] * W
    b_acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for start in range(0, W, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < W
        b_x = tl.load(p_x + o_w[None, :], mask=m_t[:, None] & m_w[None, :], other=0.0)  # [T, W]
        b_w = tl.load(p_w + o_w[:, None], mask=m_w[:, None] & m_m[None, :], other=0.0)  # [W, M]
        # tensor cores would round the inputs to tf32
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    b_bias = tl.load(bias_ptr + i_h * stride_b_head + o_m, mask=m_m, other=0.0)  # [M]
    p_out = out_ptr + (o_t[:, None] * H + i_h) * M + o_m[None, :]
    tl.store(p_out, b_acc + b_bias[None, :], mask=m_t[:, None] & m_m[None, :])


@triton.jit
def keydiff_fwd_kernel(
    kv_ptr,  # [num_blocks, H, page, 2 * D]
    block_table_ptr,  # [rows, max_blocks] int32
    query_start_loc_ptr,  # [rows + 1] int32
    seq_lens_ptr,  # [rows] int32
    scores_ptr,  # [num_blocks, H, page] float32
    anchors_ptr,  # [num_blocks, H, D] float32
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_row,
    stride_score_block,
    stride_score_head,
    stride_anchor_block,
    stride_anchor_head,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
):
    """Score the new tokens of one (row, KV head), page after page."""
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    end = tl.load(seq_lens_ptr + i_r)
    new = tl.load(query_start_loc_ptr + i_r + 1) - tl.load(query_start_loc_ptr + i_r)
    if new <= 0 or end <= 0:
        return
    start = end - new
    p_table = block_table_ptr + i_r.to(tl.int64) * stride_table_row
    p_kv = kv_ptr + i_h.to(tl.int64) * stride_kv_head
    p_scores = scores_ptr + i_h.to(tl.int64) * stride_score_head
    p_anchors = anchors_ptr + i_h.to(tl.int64) * stride_anchor_head
    o_d = tl.arange(0, D_PAD)
    o_t = tl.arange(0, PAGE_PAD)
    m_d = o_d < D

    first_page = start // PAGE
    b_previous = tl.load(p_table + tl.maximum(first_page - 1, 0)).to(tl.int64)
    p_before = p_anchors + b_previous * stride_anchor_block
    b_anchor = tl.load(p_before + o_d, mask=m_d & (o_d < first_page * D), other=0.0)  # [D_PAD]
    for i_p in range(first_page, (end + PAGE - 1) // PAGE):
        b_block = tl.load(p_table + i_p).to(tl.int64)
        o_pos = i_p * PAGE + o_t
        m_t = (o_t < PAGE) & (o_pos < end)
        b_k = tl.load(
            p_kv + b_block * stride_kv_block + o_t[:, None] * stride_kv_token + o_d[None, :],
            mask=m_t[:, None] & m_d[None, :],
            other=0.0,
        ).to(tl.float32)  # [PAGE_PAD, D_PAD]
        b_norm = tl.maximum(tl.sqrt(tl.sum(b_k * b_k, 1)), 1e-6)  # [PAGE_PAD]
        b_k = b_k / b_norm[:, None]
        b_anchor_norm = tl.maximum(tl.sqrt(tl.sum(b_anchor * b_anchor, 0)), 1e-6)
        b_u = -tl.sum(b_k * (b_anchor / b_anchor_norm)[None, :], 1)  # [PAGE_PAD]
        p_out = p_scores + b_block * stride_score_block + o_t
        tl.store(p_out, b_u, mask=m_t & (o_pos >= start))
        # only a complete page enters the sum, so that it never depends on the chunking
        if (i_p + 1) * PAGE <= end:
            b_anchor += tl.sum(b_k, 0)
            tl.store(p_anchors + b_block * stride_anchor_block + o_d, b_anchor, mask=m_d)


def write_scores(
    token_scores: torch.Tensor, slot_mapping: torch.Tensor, scores: torch.Tensor
) -> None:
    """Store the scores of new tokens; arguments as in ``reference.write_scores``."""
    tokens, heads = token_scores.shape
    if tokens == 0:
        return
    write_scores_fwd_kernel[(triton.cdiv(tokens * heads, WRITE_BLOCK),)](
        token_scores, slot_mapping, scores, tokens * heads,
        token_scores.stride(0), token_scores.stride(1), scores.stride(0), scores.stride(1),
        H=heads, PAGE=scores.shape[2], BLOCK=WRITE_BLOCK, num_warps=4,
    )  # fmt: skip


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See ``reference.project``."""
    tokens, heads, width = x.shape
    outputs = weight.shape[1]
    out = torch.empty((tokens, heads, outputs), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return out
    if outputs > 1 and weight.stride(1) != width:
        raise ValueError(f"weight must be contiguous within a head, got {weight.stride()}")
    grid = (triton.cdiv(tokens, PROJECT_TOKENS), heads, triton.cdiv(outputs, PROJECT_OUTPUTS))
    project_fwd_kernel[grid](
        x, weight, bias, out, tokens, x.stride(0), x.stride(1), weight.stride(0), bias.stride(0),
        H=heads, M=outputs, W=width, BLOCK_T=PROJECT_TOKENS, BLOCK_M=PROJECT_OUTPUTS,
        BLOCK_W=PROJECT_STEP, num_warps=4,
    )  # fmt: skip
    return out


def keydiff(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scores: torch.Tensor,
    anchors: torch.Tensor,
) -> None:
    """Score new tokens by KeyDiff; arguments as in ``reference.keydiff``."""
    _, heads, page, width = kv_cache.shape
    rows = seq_lens.shape[0]
    if rows == 0:
        return
    page_pad, d_pad = triton.next_power_of_2(page), triton.next_power_of_2(width // 2)
    keydiff_fwd_kernel[(rows, heads)](
        kv_cache, block_table, query_start_loc, seq_lens, scores, anchors,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        scores.stride(0), scores.stride(1), anchors.stride(0), anchors.stride(1),
        D=width // 2, D_PAD=d_pad, PAGE=page, PAGE_PAD=page_pad,
        num_warps=keydiff_warps(page_pad, d_pad),
    )  # fmt: skip


# (kernel, argument types, constexprs) that compile without a GPU; see common/compile_targets.py
COMPILE_CASES = [
    *(
        (
            project_fwd_kernel,
            "*fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32 i32",
            {
                "H": 8,
                "M": outputs,
                "W": width,
                "BLOCK_T": PROJECT_TOKENS,
                "BLOCK_M": PROJECT_OUTPUTS,
                "BLOCK_W": PROJECT_STEP,
            },
            {"num_warps": 4},
        )
        for outputs, width in [(1, 256), (512, 4096)]
    ),
    (
        write_scores_fwd_kernel,
        "*fp32 *i64 *fp32 i32 i32 i32 i64 i32",
        {"H": 8, "PAGE": 16, "BLOCK": WRITE_BLOCK},
        {"num_warps": 4},
    ),
    *(
        (
            keydiff_fwd_kernel,
            f"*{dtype} *i32 *i32 *i32 *fp32 *fp32 i64 i32 i32 i32 i64 i32 i64 i32",
            {"D": d, "D_PAD": d_pad, "PAGE": page, "PAGE_PAD": page},
            {"num_warps": keydiff_warps(page, d_pad)},
        )
        for dtype, d, d_pad, page in [
            ("bf16", 80, 128, 16),
            ("bf16", 128, 128, 128),
            ("fp8e4nv", 128, 128, 16),
        ]
    ),
]
