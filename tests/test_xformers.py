"""SparseKAttentionOp inside xFormers' own dispatch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("xformers", reason="xformers is not installed (pip install xformers==0.0.35)")

import xformers.ops as xops
from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

from vllm_sparsek.config import SparseKConfigError
from vllm_sparsek.dense import attention_forward
from vllm_sparsek.xformers import SparseKAttentionOp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
ATOL = 2e-3 if DEVICE == "cuda" else 2e-6
CAUSAL = xops.LowerTriangularMask()
SETTINGS = dict(k=24, window=9, sinks=3, refresh=16)


def tensors(batch=2, tokens=150, heads=4, head_dim=64):
    """q, k, v in [B, M, H, K] and scores [B, H, M]."""
    generator = torch.Generator().manual_seed(4)
    shape = batch, tokens, heads, head_dim
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for _ in range(3))
    return q, k, v, torch.randn(batch, heads, tokens, generator=generator).to(DEVICE)


def directly(q, k, v, **arguments):
    """attention_forward in xFormers' layout."""
    out = attention_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **arguments)
    return out.transpose(1, 2)


def test_the_operator_is_attention_forward_in_the_layout_of_xformers():
    q, k, v, scores = tensors()
    op = SparseKAttentionOp.with_config(scores=scores, **SETTINGS)
    out = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=op)
    assert out.shape == q.shape
    assert torch.equal(out, directly(q, k, v, scores=scores, config=SETTINGS))
    # it does drop something
    dense = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=SparseKAttentionOp)
    assert (out - dense).abs().max() > 0.1


def test_the_plain_operator_is_dense_attention_while_the_context_fits():
    q, k, v, _ = tensors()
    out = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=SparseKAttentionOp)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2).float() for t in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=ATOL)


def test_without_scores_keydiff_scores_the_keys_and_scale_is_passed_on():
    q, k, v, _ = tensors()
    op = SparseKAttentionOp.with_config(**SETTINGS)
    out = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, scale=0.3, op=op)
    expected = directly(q, k, v, config={**SETTINGS, "scorer": "keydiff"}, scale=0.3)
    assert torch.equal(out, expected)


def test_groups_share_keys_and_values_without_a_copy():
    _, k, v, _ = tensors(heads=2)
    q5 = torch.randn(2, 150, 2, 3, 64, device=DEVICE, dtype=DTYPE)
    k5, v5 = (t[:, :, :, None].expand(-1, -1, -1, 3, -1) for t in (k, v))
    scores = torch.randn(2, 2, 150, device=DEVICE)
    op = SparseKAttentionOp.with_config(scores=scores, **SETTINGS)
    out = xops.memory_efficient_attention(q5, k5, v5, attn_bias=CAUSAL, op=op)
    expected = directly(q5.flatten(2, 3), k, v, scores=scores, config=SETTINGS)
    assert out.shape == q5.shape
    assert torch.equal(out.flatten(2, 3), expected)
    # heads that share nothing are heads
    op = SparseKAttentionOp.with_config(scores=scores.repeat_interleave(3, 1), **SETTINGS)
    own = xops.memory_efficient_attention(
        q5, k5.contiguous(), v5.contiguous(), attn_bias=CAUSAL, op=op
    )
    torch.testing.assert_close(own, out, rtol=0, atol=ATOL)


def test_the_last_queries_are_asked_with_the_mask_that_says_so():
    q, k, v, scores = tensors()
    op = SparseKAttentionOp.with_config(scores=scores, **SETTINGS)
    whole = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=op)
    out = xops.memory_efficient_attention(
        q[:, -7:], k, v, attn_bias=LowerTriangularFromBottomRightMask(), op=op
    )
    torch.testing.assert_close(out, whole[:, -7:], rtol=0, atol=ATOL)
    with pytest.raises(ValueError, match="pass LowerTriangularFromBottomRightMask"):
        xops.memory_efficient_attention(q[:, -7:], k, v, attn_bias=CAUSAL, op=op)


def test_legacy_tensors_without_heads_have_one():
    q, k, v, _ = tensors(heads=1)
    op = SparseKAttentionOp.with_config(**SETTINGS)
    out = xops.memory_efficient_attention(
        q[:, :, 0], k[:, :, 0], v[:, :, 0], attn_bias=CAUSAL, op=op
    )
    expected = xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=op)[:, :, 0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


REFUSED = {
    "no-bias": (dict(attn_bias=None), "attn_bias is None: attention is causal"),
    "tensor-bias": (dict(attn_bias=torch.zeros(2, 4, 150, 150, device=DEVICE, dtype=DTYPE)),
                    "attn_bias type is <class 'torch.Tensor'>"),
    "dropout": (dict(attn_bias=CAUSAL, p=0.1), "dropout"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do_is_refused_with_the_reason(case):
    arguments, reason = case
    q, k, v, _ = tensors()
    with pytest.raises(ValueError, match=reason):
        xops.memory_efficient_attention(q, k, v, op=SparseKAttentionOp, **arguments)


@pytest.mark.parametrize("position", range(3))
def test_gradients_are_refused_with_the_reason(position):
    inputs = list(tensors()[:3])
    inputs[position].requires_grad_()
    name = ("query", "key", "value")[position]
    with pytest.raises(ValueError, match=rf"{name}\.requires_grad: forward only"):
        xops.memory_efficient_attention(*inputs, attn_bias=CAUSAL, op=SparseKAttentionOp)
    q, k, v, _ = tensors()
    with pytest.raises(NotImplementedError, match="forward only"):
        xops.fmha.memory_efficient_attention_forward_requires_grad(
            q, k, v, attn_bias=CAUSAL, op=SparseKAttentionOp[0]
        )


def test_strides_and_dtypes_are_refused_with_the_reason():
    q, k, v, _ = tensors()
    strided = q.mT.contiguous().mT
    with pytest.raises(ValueError, match=r"query\.stride\(-1\) != 1"):
        xops.memory_efficient_attention(strided, k, v, attn_bias=CAUSAL, op=SparseKAttentionOp)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        xops.memory_efficient_attention(
            q.double(), k.double(), v.double(), attn_bias=CAUSAL, op=SparseKAttentionOp
        )


@pytest.mark.gpu
def test_head_sizes_without_a_kernel_are_refused_with_the_reason():
    q, k, v, _ = tensors(head_dim=72)
    with pytest.raises(ValueError, match="head_dim is 72"):
        xops.memory_efficient_attention(q, k, v, attn_bias=CAUSAL, op=SparseKAttentionOp)


def test_settings_are_checked_when_they_are_bound():
    with pytest.raises(SparseKConfigError, match="windw"):
        SparseKAttentionOp.with_config(windw=3)
    with pytest.raises(ValueError, match="dense_until"):
        SparseKAttentionOp.with_config(dense_until=3)
