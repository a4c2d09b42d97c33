"""Prefix: SparseK over every prefix of a row of scores, in one pass."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor, implementation


def prefix(
    scores: torch.Tensor,
    k: int,
    tau_out: torch.Tensor,
    expiry_out: torch.Tensor,
    impl: str = "auto",
) -> None:
    """Threshold of every prefix and the position at which every entry loses its place.

    Row positions count what competes. With sinks and a window, pass ``scores[sinks:]``: the
    query at position i then sees the prefix that ends at ``p = i - window - sinks``, its gates
    are ``clip(u - tau[p], 0, 1)``, and token j outside the window is visible to it while
    ``i < expiry[j - sinks] + sinks + window`` (refresh 1; a longer refresh interval asks
    for the first position of i's block). Both hold for this fixed k only: with a k that grows
    with the context an entry can come back.

    Args:
        scores: [rows, n] float32 or float64, no NaN and no inf; -inf: does not compete for tau.
        k: number of places, at least 1.
        tau_out: [rows, n] of the scores' dtype; written: the smallest tau with
            sum(clip(scores[: i + 1] - tau, 0, 1)) == k. It never decreases. While at most k
            entries compete there is no smallest: the lowest finite number of the dtype, so
            that every gate is 1 (0 for a score of -inf).
        expiry_out: [rows, n] int32; written: the first position i >= j at which k entries of
            0..i beat entry j (a higher score, or an equal one that is earlier), n if none.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = scores.device
    check_tensor("scores", scores, 2, (torch.float32, torch.float64), device)
    check_tensor("tau_out", tau_out, 2, scores.dtype, device)
    check_tensor("expiry_out", expiry_out, 2, torch.int32, device)
    check_shape("tau_out", tau_out, tuple(scores.shape))
    check_shape("expiry_out", expiry_out, tuple(scores.shape))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    implementation("prefix", impl, device).prefix(scores, k, tau_out, expiry_out)
