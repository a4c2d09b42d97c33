"""Specification of prefix: SparseK over every prefix, one at a time. Plain torch, for reading."""

from __future__ import annotations

import torch


def prefix_threshold(scores: torch.Tensor, k: int) -> float:
    """The smallest tau with sum(clip(scores - tau, 0, 1)) == k; -inf while k entries fit.

    The mass is linear between the points at which an entry starts or stops to count: the two
    of them around k are looked up, and the line between them is solved.

    Args:
        scores: [m] float64 without -inf.
        k: number of places.
    """
    if scores.numel() <= k:
        return float("-inf")
    # scores more than 1 below this one get nothing
    pivot = scores.sort(descending=True).values[k]
    z = scores - pivot
    points = torch.cat([z, z - 1]).clamp(-1, 0).sort().values
    mass = (z[:, None] - points).clamp(0, 1).sum(0)
    right = int((mass <= k).nonzero()[0])
    left = right - 1
    slope = (mass[right] - mass[left]) / (points[right] - points[left])
    return (pivot + points[right] + (k - mass[right]) / slope).item()


def prefix(scores: torch.Tensor, k: int, tau_out: torch.Tensor, expiry_out: torch.Tensor) -> None:
    """See ``api.prefix``."""
    lowest = torch.finfo(scores.dtype).min
    n = scores.shape[1]
    expiry_out.fill_(n)
    for row, u in enumerate(scores.double()):
        for i in range(n):
            seen = u[: i + 1]
            tau = prefix_threshold(seen[seen > float("-inf")], k)
            tau_out[row, i] = max(tau, lowest)
            above = seen > seen[:, None]  # [j, other]
            earlier = (seen == seen[:, None]).tril(-1)
            lost = (above | earlier).sum(1) >= k
            first = lost & (expiry_out[row, : i + 1] == n)
            expiry_out[row, : i + 1][first] = i
