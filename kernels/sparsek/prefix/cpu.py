"""Prefix on the CPU: a walk along each row with three marks in the sorted scores.

Plain Python numbers, because the walk is O(n) and its steps depend on each other. Searching all
prefixes at once with vectorised torch, O(n log n) a step, took 25 times as long for rows of 32k.
"""

from __future__ import annotations

import torch


def walk(
    scores: list[float], ordered: list[float], order: list[int], rank: list[int], k: int
) -> tuple[list[float], list[int]]:
    """Thresholds and expiry times of one row.

    Every mark is an index of the sorted scores that only moves to higher ones. Which entries
    lost their place (``worst``), have gate 0 (``floor``) or a gate below 1 (``cap``) is whether
    their rank is behind the mark; entries that did not arrive yet are passed all the same.
    Ranks are compared, not scores with tau, so that no rounding can contradict the marks.

    tau rises from one point at which a mark moves to the next until the mass is k again:
    between two of them the mass falls by ``inside`` times the rise.

    Args:
        scores: n scores.
        ordered: the scores, descending, of equals the earlier first.
        order: position of every sorted score.
        rank: place of every score in the sorted row.
        k: number of places.

    Returns:
        n thresholds, -inf while everything fits, and n expiry times.
    """
    n, tau = len(scores), float("-inf")
    thresholds, expiry = [tau] * n, [n] * n
    worst = floor = n - 1
    while floor >= 0 and ordered[floor] == tau:
        floor -= 1
    cap = floor
    support = inside = 0  # entries with a gate, entries with a gate below 1
    for i, place in enumerate(rank):
        if i >= k:
            while order[worst] >= i:
                worst -= 1
            if place > worst:
                expiry[i] = i
            else:
                expiry[order[worst]] = i
                worst -= 1
        if place <= floor:
            excess = 1.0
            support += 1
            if place > cap:
                inside += 1
                excess = scores[i] - tau
            # a support of k has a mass of at most k, whatever rounding says
            while excess > 0 and support > k:
                stop = ordered[floor]
                capped = cap >= 0 and ordered[cap] - 1 <= stop
                if capped:
                    stop = ordered[cap] - 1
                if inside:
                    loss = inside * (stop - tau)
                    if loss >= excess:
                        tau = min(tau + excess / inside, stop)
                        break
                    excess -= loss
                tau = stop
                if capped:
                    inside += order[cap] <= i
                    cap -= 1
                else:
                    gone = order[floor] <= i
                    inside -= gone
                    support -= gone
                    floor -= 1
        thresholds[i] = tau
    return thresholds, expiry


def prefix(scores: torch.Tensor, k: int, tau_out: torch.Tensor, expiry_out: torch.Tensor) -> None:
    """See ``api.prefix``."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1]).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    lowest = torch.finfo(scores.dtype).min
    for row in range(scores.shape[0]):
        tau, expiry = walk(
            scores[row].tolist(), ordered[row].tolist(), order[row].tolist(), rank[row].tolist(), k
        )
        tau_out[row] = torch.tensor(tau, dtype=torch.float64).clamp(min=lowest)
        expiry_out[row] = torch.tensor(expiry, dtype=torch.int32)
