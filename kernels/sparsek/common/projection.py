"""The SparseK projection: p = clip(z - tau, 0, 1) with sum(p) = k, over the last dimension.

Lou, Jia, Zheng, Tu, "Sparser is Faster and Less is More", arXiv 2406.16747.
"""

from __future__ import annotations

import torch

# the bracket of tau is 1 wide; every step divides it by PARTS, until float64 ends
PARTS, STEPS = 64, 9


def sparsek_gates(scores: torch.Tensor, k: float | torch.Tensor) -> torch.Tensor:
    """The point of {0 <= p <= 1, sum(p) = k} that is nearest to the scores, in float64.

    A search finds which entries end at 0, at 1 and in between; tau then follows from the
    entries in between in closed form, so that it is exact to rounding. The search is on tau:
    breakpoints ``z - 1`` compared with ``>=`` are wrong in floating point, (z - 1) + 1 != z.
    Everything is relative to one score, so that scores of any size keep their fractions.

    Args:
        scores: [..., n], floating point, no NaN and no inf; -inf: the entry does not compete.
        k: places, at least 0; a number, or a tensor [...] with one for every row.

    Returns:
        [..., n] float64: 0 where an entry does not compete; 1 on all that do, if they are k
        or fewer (their sum is then their number, not k).
    """
    n = scores.shape[-1]
    if n == 0:
        return scores.double()
    budget = torch.as_tensor(k, dtype=torch.float64, device=scores.device)
    budget = budget.expand(scores.shape[:-1]).unsqueeze(-1)
    competes = scores > float("-inf")
    fits = competes.sum(-1, keepdim=True) <= budget
    ascending = scores.sort(-1).values
    # tau lies in (pivot - 1, pivot]: fewer than k + 1 entries are above the pivot
    place = n - 1 - budget.floor().clamp(max=n - 1).long()
    pivot = ascending.gather(-1, place).double()
    pivot = torch.where(fits, torch.zeros_like(pivot), pivot)
    ascending = (ascending.double() - pivot).clamp(-1, 1)
    total = torch.nn.functional.pad(ascending.cumsum(-1), (1, 0))

    def mass(tau: torch.Tensor) -> torch.Tensor:
        """sum(clip(z - tau, 0, 1)) for every tau of [..., m]."""
        above = torch.searchsorted(ascending, tau, right=True)
        capped = torch.searchsorted(ascending, tau + 1)
        inside = total.gather(-1, capped) - total.gather(-1, above)
        return n - capped + inside - (capped - above) * tau

    parts = torch.linspace(0, 1, PARTS + 1, dtype=torch.float64, device=scores.device)
    low, high = torch.full_like(pivot, -1.0), torch.zeros_like(pivot)
    for _ in range(STEPS):
        grid = low + (high - low) * parts
        last = (mass(grid) > budget).sum(-1, keepdim=True)
        low = grid.gather(-1, (last - 1).clamp(min=0))
        high = grid.gather(-1, last.clamp(max=PARTS))
    tau = (low + high) / 2
    z = scores.double() - pivot
    inside = (z > tau) & (z - tau < 1)
    missing = torch.where(inside, z, 0.0).sum(-1, keepdim=True) + (z - tau >= 1).sum(
        -1, keepdim=True
    )
    count = inside.sum(-1, keepdim=True)
    tau = torch.where(count > 0, (missing - budget) / count, tau)
    # nothing ends in between: k entries are at least 1 above the pivot, which gets nothing
    flat = ((z > 0) == (z >= 1)).all(-1, keepdim=True) & ((z >= 1).sum(-1, keepdim=True) == budget)
    tau = torch.where(flat, torch.zeros_like(tau), tau)
    return torch.where(fits, competes.double(), (z - tau).clamp(0, 1))
