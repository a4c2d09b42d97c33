"""What vLLM's FlashAttention-3 does, in plain torch, with what it demands of its arguments."""

from __future__ import annotations

import itertools

import torch

ALIGNMENT = 16  # bytes


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
    softmax_scale=None, causal=False, block_table=None, out=None, num_splits=0, fa_version=0,
    q_descale=None, k_descale=None, v_descale=None,
):  # fmt: skip
    """Causal attention aligned to the bottom right; a query that sees nothing gets zeros.

    Args:
        q, out: [total_q, Hq, D], last stride 1; out is bfloat16 if q is float8_e4m3fn.
        k, v: [pages, page, H, D] with ``block_table`` [requests, columns] and ``seqused_k``
            [requests], or [total_k, H, D] with ``cu_seqlens_k``.
        cu_seqlens_q, cu_seqlens_k: [requests + 1] int32.
        q_descale, k_descale, v_descale: [requests, H] float32, with float8_e4m3fn; probabilities
            are then rounded to it, too.
    """
    assert (causal, fa_version) == (True, 3)
    requests = cu_seqlens_q.numel() - 1
    fp8 = q.dtype == torch.float8_e4m3fn
    assert out.dtype == (torch.bfloat16 if fp8 else q.dtype)
    for scale in (q_descale, k_descale, v_descale):
        assert (scale is not None) == fp8
        assert not fp8 or (scale.dtype, scale.shape) == (torch.float32, (requests, k.shape[-2]))
    for tensor in (q, k, v, out):
        assert tensor is out or tensor.dtype == q.dtype
        assert fp8 or q.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert all(s * tensor.element_size() % ALIGNMENT == 0 for s in tensor.stride()[:-1])
    for numbers in (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table):
        assert numbers is None or (numbers.dtype == torch.int32 and numbers.is_contiguous())
    assert out.shape == q.shape
    assert k.shape == v.shape
    assert q.shape[0] == cu_seqlens_q[-1] and cu_seqlens_q[0] == 0
    assert (cu_seqlens_k is None) == (block_table is not None) == (seqused_k is not None)
    if block_table is not None:
        assert block_table.shape[0] == seqused_k.numel() == requests
    group = q.shape[1] // k.shape[-2]
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        assert 0 <= end - begin <= max_seqlen_q
        if block_table is None:
            rows = slice(*cu_seqlens_k[i : i + 2].tolist())
            key, value = k[rows], v[rows]
        else:
            length, page = int(seqused_k[i]), k.shape[1]
            assert 0 <= length <= max_seqlen_k
            assert -(-length // page) <= block_table.shape[1]
            # what lies behind the end is not looked at
            pages = block_table[i, : -(-length // page)].long()
            assert pages.numel() == 0 or 0 <= pages.min() <= pages.max() < k.shape[0]
            key, value = k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]
        key, value = (t.repeat_interleave(group, 1).transpose(0, 1).float() for t in (key, value))
        if key.shape[1] == 0:
            out[begin:end] = 0
            continue
        query = q[begin:end].transpose(0, 1).float()
        sees = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
        sees = sees.tril(key.shape[1] - query.shape[1])
        if fp8:
            # one KV head a request, as our tables have it
            query, key, value = (
                t * scale[i, 0] for t, scale in zip((query, key, value),
                (q_descale, k_descale, v_descale), strict=True)
            )  # fmt: skip
        logits = (query @ key.mT * softmax_scale).masked_fill(~sees, float("-inf"))
        weights = (logits - logits.amax(-1, keepdim=True)).exp().masked_fill(~sees, 0.0)
        total = weights.sum(-1, keepdim=True)
        if fp8:
            weights = weights.to(q.dtype).float()
        found = (weights @ value / total).masked_fill(total == 0, 0.0)
        out[begin:end] = found.transpose(0, 1).to(out.dtype)
