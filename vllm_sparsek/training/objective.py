"""What a scorer is fitted to: the attention that its selections drop, as few of it as can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.operator import sparsek


@dataclass(frozen=True)
class Targets:
    """What dense attention of one layer pays to the tokens of some windows.

    Attributes:
        mass: [W, S, H, n] float32, see ``capture.Layer``.
        answers: [W, H, n] float32, see ``capture.Layer``.
        segment: query positions a segment of ``mass``.
    """

    mass: torch.Tensor
    answers: torch.Tensor
    segment: int


@dataclass(frozen=True)
class Split:
    """How a budget is split: sinks and window are always read, the rest competes.

    Attributes:
        window, sinks: tokens.
        answer_weight: what attention of answers counts beside that of ordinary queries.
    """

    window: int = 512
    sinks: int = 16
    answer_weight: float = 1.0

    def window_of(self, budget: int) -> int:
        """Tokens of the window in a budget: all of it, but never over a quarter of the budget."""
        return min(self.window, budget // 4)

    def budget(self, kept: int, refresh: int) -> Budget:
        """The budget of a layer that reads ``kept`` tokens and selects every ``refresh``."""
        window = self.window_of(kept)
        return Budget(k=kept - window - self.sinks, window=window, sinks=self.sinks,
                      refresh=refresh)  # fmt: skip


@dataclass(frozen=True)
class Competition:
    """One query segment under one budget: tokens [first, end) compete for k places."""

    share: float
    segment: int
    first: int
    end: int
    k: int


def competitions(
    segments: int, segment: int, shares: tuple[float, ...], split: Split
) -> Iterator[Competition]:
    """Every segment in which something must be dropped, for budgets as shares of the context."""
    for share in shares:
        for s in range(segments):
            context = s * segment + segment // 2
            budget = int(share * context)
            window = split.window_of(budget)
            end, k = s * segment - window, budget - window - split.sinks
            if k >= 1 and end - split.sinks > k:
                yield Competition(share, s, split.sinks, end, k)


def dropped(
    scores: torch.Tensor, targets: Targets, shares: tuple[float, ...], split: Split
) -> torch.Tensor:
    """Mean attention lost if the SparseK operator over ``scores`` decided what is kept.

    Args:
        scores: [H, W, n], with gradients.
        targets: of the same windows.
        shares: budgets.
        split: of the budgets.

    Returns:
        Scalar: attention mass dropped per query, plus the weighted share of answers'
        attention, averaged over heads, windows, segments and budgets.
    """
    segments = targets.mass.shape[1]
    total, count = scores.new_zeros(()), 0
    for c in competitions(segments, targets.segment, shares, split):
        lost = 1 - sparsek(scores[..., c.first : c.end], c.k)
        paid = targets.mass[:, c.segment, :, c.first : c.end]
        if c.segment == segments - 1:
            paid = paid + split.answer_weight * targets.answers[..., c.first : c.end]
        total = total + (lost * paid.transpose(0, 1)).sum(-1).mean()
        count += 1
    return total / max(count, 1)


def kept_share(
    scores: torch.Tensor, targets: Targets, share: float, split: Split
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall: shares of attention to far tokens and of answers' attention that top-k keeps.

    Args:
        scores: [H, W, n]; targets: of the same windows; share: the budget; split: of it.

    Returns:
        two scalars, 0..1 (1 if nothing has to be dropped).
    """
    kept = total = answers_kept = answers = torch.zeros((), device=scores.device)
    segments = targets.mass.shape[1]
    for c in competitions(segments, targets.segment, (share,), split):
        z = scores[..., c.first : c.end]
        chosen = torch.zeros_like(z).scatter_(-1, z.topk(c.k, dim=-1).indices, 1.0)
        paid = targets.mass[:, c.segment, :, c.first : c.end].transpose(0, 1)
        kept, total = kept + (chosen * paid).sum(), total + paid.sum()
        if c.segment == segments - 1:
            paid = targets.answers[..., c.first : c.end].transpose(0, 1)
            answers_kept, answers = answers_kept + (chosen * paid).sum(), answers + paid.sum()
    one = torch.ones((), device=scores.device)
    return (kept / total if total > 0 else one), (answers_kept / answers if answers > 0 else one)
