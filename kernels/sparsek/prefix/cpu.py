"""Prefix on the CPU: every step of a search serves all prefixes at once.

Both searches rest on one observation. What is searched for (a rank, a threshold) moves in one
direction along a row, and so do the candidates of every step. Entry j therefore counts for one
run of positions, which is found by one binary search, and the counts of all prefixes are the
running sum of where runs begin and end: O(n log n) a step.
"""

from __future__ import annotations

import torch

ROW_NUMBERS = 1 << 18  # scores handled at once: what stays in cache
# every fourth step of the threshold search halves the bracket: the end for any scores
STEPS, HALVE_EVERY = 200, 4
TOLERANCE = 1e-12  # of tau, relative to 1 or its size
# sums of whole parts are kept modulo this: whatever enters and leaves, nothing is lost
WHOLE = 1 << 40


def running_sum(weight: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Sum over j of weight[j] at every position i with begin[j] <= i < end[j].

    Args:
        weight: [rows, n]; begin, end: [rows, n] int64 in 0..n, begin <= end.

    Returns:
        [rows, n] of the dtype of ``weight``.
    """
    rows, n = weight.shape
    change = weight.new_zeros(rows, n + 1)
    change.scatter_add_(1, begin, weight).scatter_add_(1, end, -weight)
    return change[:, :n].cumsum(1)


def first_lost_rank(rank: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th rank of every prefix, counted from 0, bit by bit from the highest.

    Args:
        rank: [rows, n] int64, every row a permutation.
        k: number of places.

    Returns:
        [rows, n] int64, not increasing: entries of this rank or a higher one have no place;
        n or more while there are places left.
    """
    n = rank.shape[1]
    position = torch.arange(n).expand_as(rank)
    found = torch.zeros_like(rank)
    ones = torch.ones_like(rank)
    for bit in reversed(range(n.bit_length())):
        candidate = found + (1 << bit) - 1
        end = n - torch.searchsorted(candidate.flip(1), rank)
        better = running_sum(ones, position, torch.maximum(end, position))
        found += (better <= k).long() << bit
    return found


class Thresholds:
    """The search for the thresholds of all prefixes of a few rows.

    Args:
        scores: [rows, n] float64; -inf does not compete.
        pivot: [rows, n] float64, the k-th score of every prefix, counted from 0; -inf where
            there is none. The threshold lies in (pivot - 1, pivot].
        k: number of places.
    """

    def __init__(self, scores: torch.Tensor, pivot: torch.Tensor, k: int):
        self.competes = scores > float("-inf")
        self.scores = torch.where(self.competes, scores, 0.0)
        whole = self.scores.floor()
        self.fraction = self.scores - whole
        self.whole = whole.remainder(WHOLE).long()
        self.pivot, self.k = pivot, k
        self.position = torch.arange(scores.shape[1]).expand(scores.shape)

    def runs(self, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where entry j stops to have gate 1 and where it loses its gate: 2 x [rows, n].

        Args:
            tau: [rows, n] float64, not decreasing.
        """
        capped = torch.searchsorted(tau, self.scores - 1, right=True)
        lost = torch.searchsorted(tau, self.scores)
        capped = torch.where(self.competes, capped.maximum(self.position), self.position)
        lost = torch.where(self.competes, lost.maximum(capped), self.position)
        return capped, lost

    def excess(self, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass of every prefix at its tau, less k, and how many entries have a gate in (0, 1).

        Args:
            tau: [rows, n] float64, not decreasing.

        Returns:
            [rows, n] float64 and [rows, n] int64.
        """
        capped, lost = self.runs(tau)
        ones = torch.ones_like(self.position)
        full = running_sum(ones, self.position, capped)
        count = running_sum(ones, capped, lost)
        whole_tau = tau.floor()
        whole = running_sum(self.whole, capped, lost) - count * whole_tau.remainder(WHOLE).long()
        whole = (whole + WHOLE // 2).remainder(WHOLE) - WHOLE // 2
        fraction = running_sum(self.fraction, capped, lost) - count * (tau - whole_tau)
        return full - self.k + whole + fraction, count

    def search(self) -> torch.Tensor:
        """The smallest threshold of every prefix, -inf where everything fits: [rows, n]."""
        low, high = self.pivot - 1, self.pivot.clone()
        lowest = torch.finfo(torch.float64).min
        low, high = low.clamp_(min=lowest), high.clamp_(min=lowest)
        tau = high  # already the answer where entry k is at least 1 below those before it
        for step in range(STEPS):
            excess, count = self.excess(tau)
            # bounds of one prefix bind the others: thresholds never decrease
            low = torch.where(excess > 0, tau, low).cummax(1).values
            high = torch.where(excess > 0, high, tau)
            high = high.flip(1).cummin(1).values.flip(1)
            newton = tau + excess / count.clamp(min=1)
            settled = (newton - tau).abs() <= TOLERANCE * tau.abs().clamp(min=1)
            settled |= high - low <= TOLERANCE * tau.abs().clamp(min=1)
            if bool(settled.all()):
                break
            inner = (newton >= low) & (newton <= high) & (step % HALVE_EVERY < HALVE_EVERY - 1)
            better = torch.where(inner, newton, low / 2 + high / 2)
            tau = torch.where(settled, tau, better).cummax(1).values
        return torch.where(self.pivot > float("-inf"), tau, self.pivot)


def prefix(scores: torch.Tensor, k: int, tau_out: torch.Tensor, expiry_out: torch.Tensor) -> None:
    """See ``api.prefix``."""
    rows, n = scores.shape
    lowest = torch.finfo(scores.dtype).min
    step = max(1, ROW_NUMBERS // max(n, 1))
    position = torch.arange(n)
    for start in range(0, rows if n else 0, step):
        part = slice(start, min(rows, start + step))
        ordered, order = scores[part].sort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
        lost = first_lost_rank(rank, k)
        gone = n - torch.searchsorted(lost.flip(1), rank, right=True)
        expiry_out[part] = torch.maximum(gone, position).int()
        pivot = ordered.double().gather(1, lost.clamp(max=n - 1))
        pivot = pivot.masked_fill(lost >= n, float("-inf"))
        tau = Thresholds(scores[part].double(), pivot, k).search()
        tau_out[part] = tau.clamp(min=lowest).to(scores.dtype)
