"""Attention of one layer over a selection that passes gradients on to the scores.

Forward it is what serves: attention over sinks, window and the tokens with the k highest scores.
Backward a token's place is the gate that the SparseK operator gives it (a straight-through
estimate; Bengio, Léonard, Courville, arXiv 1308.3432), so the loss is that of the served scorer. A
gate multiplies a token's exponential, in numerator and denominator alike: gates of 0 and 1 are
then the softmax over the selection, which gates on values alone, as in mode ``soft_v``, are not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.operator import prefix_threshold
from vllm_sparsek.training.sparse import dense_attention

# queries at once: later ones need not look at what lies behind earlier ones
CHUNK = 512


def gates(scores: torch.Tensor, at: torch.Tensor, budget: Budget) -> torch.Tensor:
    """What the queries at some positions read: 0 or 1, with the SparseK operator's gradient.

    Args:
        scores: [H, n] float32, with gradients.
        at: [m] ascending query positions, the last one below n.
        budget: of token granularity and a fixed k.

    Returns:
        [H, m, at[-1] + 1] of the scores' dtype; tokens behind a query count as its window.
    """
    token = torch.arange(int(at[-1]) + 1, device=at.device)
    start = at // budget.refresh * budget.refresh
    tau, expiry = prefix_threshold(scores[:, budget.sinks :].contiguous(), budget.k)
    last = start - budget.window - budget.sinks
    tau = tau[:, last.clamp_min(0), None]  # [H, m, 1]
    soft = (scores[:, None, : len(token)] - tau).clamp(0, 1)
    lost = F.pad(expiry, (budget.sinks, 0))[:, None, : len(token)]
    kept = (start[:, None] < lost + budget.sinks + budget.window).to(soft.dtype)
    always = (token < budget.sinks) | (token > (start - budget.window)[:, None])
    return torch.where(always, 1.0, kept + (soft - soft.detach()))


def soft_attention(
    query: torch.Tensor,
    at: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    budget: Budget,
    scale: float,
) -> torch.Tensor:
    """Sparse causal attention of some queries of one request from position 0.

    Args:
        query: [Hq, m, D], at the positions ``at`` [m], ascending.
        key, value: [H, n, D].
        scores: [H, n] float32, with gradients.
        budget: of token granularity and a fixed k.
        scale: softmax scale.

    Returns:
        [Hq, m, D] of query's dtype.
    """
    heads, _, head_dim = key.shape
    gate = gates(scores, at, budget)
    end = gate.shape[2]
    logits = (query.reshape(heads, -1, head_dim) @ key[:, :end].transpose(1, 2)).float() * scale
    future = torch.arange(end, device=at.device) > at[:, None]
    p = logits.view(heads, -1, len(at), end).masked_fill(future, float("-inf")).softmax(-1)
    p = p * gate[:, None]
    # where dense attention leaves the selection nothing that float32 can hold
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (p.view(heads, -1, end).to(value.dtype) @ value[:, :end]).view(query.shape)


def soft_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    budget: Budget,
    scale: float,
) -> torch.Tensor:
    """Causal attention of one request, every query beyond the budget as in ``soft_attention``.

    Args and result as of ``sparse.sparse_attention``, to which it is equal.
    """
    n = key.shape[1]
    first = budget.first_sparse_position(n)
    dense = dense_attention(query[:, :first], key[:, :first], value[:, :first], scale)
    sparse = [
        soft_attention(query[:, at], at, key, value, scores, budget, scale)
        for at in torch.arange(first, n, device=query.device).split(CHUNK)
        if len(at)
    ]
    return torch.cat([dense, *sparse], dim=1)
