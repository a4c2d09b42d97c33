"""Triton kernel of write: one program per block of tokens and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.device import fp8_of
from vllm_sparsek.kernels.common.early_launch import begin, launch_early
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.kernels.write.linear import LinearScore

BLOCK_T = 8  # tokens per program: decode's few tokens still make a program for every KV head
WARPS = 4
QUARTER = tl.constexpr(1.5707963267948966)  # of a turn, in float64


@triton.jit
def _sine_cosine(b_angle):
    """Sine and cosine of float32 angles [T, D], as long as contexts are.

    Quarter turns are taken off in float64, which is exact enough at any position; the rest,
    within an eighth of a turn, takes the first terms of the power series (off by under 1e-7).
    """
    b_quarter = tl.full(b_angle.shape, QUARTER, tl.float64)
    b_per_quarter = tl.full(b_angle.shape, 1 / QUARTER, tl.float64)
    b_wide = b_angle.to(tl.float64)
    b_turns = tl.floor(b_wide * b_per_quarter + 0.5)
    b_x = (b_wide - b_turns * b_quarter).to(tl.float32)
    b_xx = b_x * b_x
    b_series = 1 / 120 - b_xx * (1 / 5040 - b_xx * (1 / 362880))
    b_s = b_x - b_x * b_xx * (1 / 6 - b_xx * b_series)
    b_series = 1 / 24 - b_xx * (1 / 720 - b_xx * (1 / 40320))
    b_c = 1 - b_xx * (1 / 2 - b_xx * b_series)
    b_n = b_turns.to(tl.int32) & 3
    b_odd = (b_n & 1) == 1
    b_sin = tl.where(b_odd, b_c, b_s)
    b_cos = tl.where(b_odd, b_s, b_c)
    return tl.where(b_n >= 2, -b_sin, b_sin), tl.where((b_n == 1) | (b_n == 2), -b_cos, b_cos)


@triton.jit(do_not_specialize=["tokens"])
def write_tokens_fwd_kernel(
    key_ptr,  # [T, H, D]
    value_ptr,  # [T, H, D]
    kv_ptr,  # [num_blocks, H, page, 2 * D]
    positions_ptr,  # [>= T] int32
    slot_mapping_ptr,  # [>= T] int64
    weight_ptr,  # [3, H, D] float32
    bias_ptr,  # [H] float32
    slope_ptr,  # [H] float32
    inv_freq_ptr,  # [PAIRS] float32; not read if PAIRS is 0
    k_scale_ptr,  # [1] float32; not read unless FP8
    v_scale_ptr,  # [1] float32
    scores_ptr,  # [num_blocks, H, page] float32
    tokens,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_score_block,
    stride_score_head,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Store keys, values and scores of BLOCK_T tokens of one KV head."""
    begin(EARLY)
    i_h = tl.program_id(1)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    m = m_t[:, None] & m_d[None, :]
    o_token = o_t.to(tl.int64)[:, None]
    p_key = key_ptr + i_h.to(tl.int64) * stride_key_head + o_token * stride_key_token
    p_value = value_ptr + i_h.to(tl.int64) * stride_value_head + o_token * stride_value_token
    p_weight = weight_ptr + i_h * D + o_d
    # all loads before any store: a step of decode waits for little else than them
    b_slot = tl.load(slot_mapping_ptr + o_t, mask=m_t, other=-1).to(tl.int64)
    b_position = tl.load(positions_ptr + o_t, mask=m_t, other=0).to(tl.float32)
    b_k = tl.load(p_key + o_d[None, :], mask=m, other=0.0)  # [BLOCK_T, D_PAD]
    b_v = tl.load(p_value + o_d[None, :], mask=m, other=0.0)
    b_key_weight = tl.load(p_weight + H * D, mask=m_d, other=0.0)
    b_value_weight = tl.load(p_weight + 2 * H * D, mask=m_d, other=0.0)
    b_key = b_k.to(tl.float32)
    b_value = b_v.to(tl.float32)
    b_u = b_key * b_key_weight[None, :] + b_value * b_value_weight[None, :]
    if PAIRS > 0:
        # every component beside the other one of its pair
        if INTERLEAVED:
            o_other = o_d ^ 1
            o_pair = o_d // 2
            b_sign = 1.0 - 2.0 * (o_d % 2).to(tl.float32)
        else:
            o_other = tl.where(o_d < PAIRS, o_d + PAIRS, o_d - PAIRS)
            o_pair = o_d % PAIRS
            b_sign = tl.where(o_d < PAIRS, 1.0, -1.0)
        m_pair = o_d < 2 * PAIRS
        b_freq = tl.load(inv_freq_ptr + o_pair, mask=m_pair, other=0.0)
        b_turned_weight = tl.load(p_weight, mask=m_d, other=0.0)
        b_other = tl.load(
            p_key + o_other[None, :], mask=m_t[:, None] & m_pair[None, :], other=0.0
        ).to(tl.float32)
        b_sin, b_cos = _sine_cosine(b_position[:, None] * b_freq[None, :])
        b_turned = b_key * b_cos + b_sign[None, :] * b_other * b_sin
        b_u += b_turned * b_turned_weight[None, :]
    b_score = tl.sum(b_u, 1) + tl.load(bias_ptr + i_h) + b_position * tl.load(slope_ptr + i_h)
    if FP8:
        b_k = fp8_of(tl.math.div_rn(b_key, tl.load(k_scale_ptr) + tl.zeros_like(b_key)))
        b_v = fp8_of(tl.math.div_rn(b_value, tl.load(v_scale_ptr) + tl.zeros_like(b_value)))

    # tokens of padding have no slot
    m_t = m_t & (b_slot >= 0)
    m = m_t[:, None] & m_d[None, :]
    o_block = b_slot // PAGE
    o_slot = b_slot % PAGE
    p_kv = kv_ptr + i_h.to(tl.int64) * stride_kv_head
    p_kv += (o_block * stride_kv_block + o_slot * stride_kv_token)[:, None] + o_d[None, :]
    tl.store(p_kv, b_k.to(kv_ptr.dtype.element_ty), mask=m)
    tl.store(p_kv + D, b_v.to(kv_ptr.dtype.element_ty), mask=m)
    p_scores = scores_ptr + i_h.to(tl.int64) * stride_score_head
    tl.store(p_scores + o_block * stride_score_block + o_slot, b_score, mask=m_t)


def write_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    linear: LinearScore,
    kv_cache: torch.Tensor,
    scores: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``reference.write_tokens``."""
    tokens, heads, head_dim = key.shape
    if tokens == 0:
        return
    pairs = 0 if linear.inv_freq is None else linear.inv_freq.shape[0]
    k_scale, v_scale = kv_scales if kv_scales is not None else (linear.bias, linear.bias)
    write_tokens_fwd_kernel[(triton.cdiv(tokens, BLOCK_T), heads)](
        key, value, kv_cache, positions, slot_mapping, linear.weight.contiguous(), linear.bias,
        linear.slope, linear.bias if linear.inv_freq is None else linear.inv_freq,
        k_scale, v_scale, scores, tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        scores.stride(0), scores.stride(1),
        H=heads, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=kv_cache.shape[2],
        PAIRS=pairs, INTERLEAVED=linear.interleaved, FP8=kv_cache.dtype == FP8,
        BLOCK_T=BLOCK_T, num_warps=WARPS, **launch_early(key.device),
    )  # fmt: skip


# (kernel, argument types, constexprs) that compile without a GPU; see common/compile_targets.py
COMPILE_CASES = [
    (
        write_tokens_fwd_kernel,
        f"*{dtype} *{dtype} *{cache} *i32 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 "
        "i64 i32 i64 i32 i64 i32 i32 i64 i32",
        {
            "H": 8,
            "D": d,
            "D_PAD": triton.next_power_of_2(d),
            "PAGE": page,
            "PAIRS": pairs,
            "INTERLEAVED": interleaved,
            "FP8": cache == "fp8e4nv",
            "BLOCK_T": BLOCK_T,
            "EARLY": False,
        },
        {"num_warps": WARPS},
    )
    for dtype, cache, d, page, pairs, interleaved in [
        ("bf16", "bf16", 128, 16, 64, False),
        ("bf16", "fp8e4nv", 128, 16, 64, False),
        ("fp16", "fp16", 80, 128, 20, True),
        ("bf16", "bf16", 256, 16, 0, False),
    ]
]
