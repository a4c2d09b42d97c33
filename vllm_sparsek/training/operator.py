"""The SparseK operator with gradients, over whole rows and over every prefix of them.

Lou, Jia, Zheng, Tu, "Sparser is Faster and Less is More", arXiv 2406.16747.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vllm_sparsek.kernels.common.projection import sparsek_gates
from vllm_sparsek.kernels.prefix import api as prefix_api

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, k: float | torch.Tensor) -> torch.Tensor:
        p = sparsek_gates(z, k)
        # of the exact gates: rounded to 16 bits, some that can still move are 0 or 1
        ctx.save_for_backward((p > 0) & (p < 1))
        return p.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        # a sum in 16 bits would lose the small gradients of long rows
        wide = torch.where(inside, dp.to(torch.promote_types(dp.dtype, torch.float32)), 0.0)
        mean = wide.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(inside, wide - mean, 0.0).to(dp.dtype), None


def sparsek(
    z: torch.Tensor, k: float | torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """argmin over p of |p - z|^2 with 0 <= p <= 1 and sum(p) = k, over the last dimension.

    p = clip(z - tau, 0, 1). The gradient is that of the paper: with s = 1[0 < p < 1],
    dz = s (dp - (s . dp) / |s|); rows in which nothing lies between 0 and 1 pass none on.
    It can be differentiated once.

    Args:
        z: [..., n] scores: float16, bfloat16, float32 or float64; no NaN and no inf. An entry
            with -inf does not compete.
        k: places, at least 0: a number, or a tensor [...] with one for every row. It gets no
            gradient.
        mask: bool, broadcast to z; where False an entry does not compete.

    Returns:
        [..., n] of z's dtype: 0 where an entry does not compete, 1 on all that do if there are
        no more than k. Everything is computed in float64 and rounded once: in bfloat16
        every p is right to 2^-9, and their sum to the sum of these errors.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
    """
    if z.dtype not in FLOATS:
        raise TypeError(f"z must be one of {FLOATS}, got {z.dtype}")
    if z.dim() == 0:
        raise ValueError("z must have at least one dimension")
    if isinstance(k, torch.Tensor):
        if k.shape and k.shape != z.shape[:-1]:
            raise ValueError(f"k must be a number or {tuple(z.shape[:-1])}, got {tuple(k.shape)}")
    elif not k >= 0:
        raise ValueError(f"k must be at least 0, got {k}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
        z = z.masked_fill(~mask, float("-inf"))
    return _SparseK.apply(z, k)


class _PrefixThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = scores.reshape(-1, scores.shape[-1])
        tau = torch.empty_like(rows)
        expiry = torch.empty_like(rows, dtype=torch.int32)
        prefix_api.prefix(rows, k, tau, expiry)
        ctx.save_for_backward(rows, tau)
        expiry = expiry.view(scores.shape)
        ctx.mark_non_differentiable(expiry)
        return tau.view(scores.shape), expiry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtau: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """tau_i moves by 1 / |s_i| with every entry inside: s_ij = 1[tau_i <= u_j < tau_i + 1].

        An entry on tau_i counts: where none has a gate strictly between 0 and 1, tau_i is that
        entry and moves with it, so that its gate stays 0. As tau never decreases, entry j is
        inside for one run of positions, from where it stops to be capped until it is lost.
        """
        scores, tau = ctx.saved_tensors
        rows, n = scores.shape
        u, bound = scores.double(), tau.double()
        position = torch.arange(n, device=u.device).expand_as(u)
        begin = torch.searchsorted(bound, u - 1, right=True).maximum(position)
        end = torch.searchsorted(bound, u, right=True).maximum(begin)
        change = torch.zeros(rows, n + 1, dtype=torch.int64, device=u.device)
        ones = torch.ones_like(position)
        change.scatter_add_(1, begin, ones).scatter_add_(1, end, -ones)
        inside = change[:, :n].cumsum(1)
        share = dtau.reshape(rows, n).double() / inside.clamp(min=1)
        total = torch.nn.functional.pad(share.cumsum(1), (1, 0))
        du = total.gather(1, end) - total.gather(1, begin)
        return du.to(dtau.dtype).view(dtau.shape), None


def prefix_threshold(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseK's threshold of every prefix, with gradients, and every entry's expiry time.

    The gates of position i are ``(scores[j] - tau[i]).clamp(0, 1)`` for j <= i: the SparseK
    operator over the prefix, without a projection per position.

    Args:
        scores: [..., n] float32 or float64, no NaN and no inf; -inf: does not compete.
        k: number of places, at least 1.

    Returns:
        tau [..., n] of the scores' dtype and expiry [..., n] int32; see
        ``vllm_sparsek.kernels.prefix.api``, also for how sinks and a window shift them.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
    """
    return _PrefixThreshold.apply(scores, k)
