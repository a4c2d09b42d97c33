"""Fitting one layer's scorer: a closed-form start, then gradients through the SparseK operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

import torch

from vllm_sparsek.training.objective import Split, Targets, dropped

# ridge of the closed form, relative to the features' unit variance
RIDGE = 1e-3
# added to attention relative to uniform before the logarithm: far below what is ever kept
FLOOR = 1e-4
# tokens that are summed in float32
SUM_ROWS = 1024
# queries a token must have been measured by, in segments, to enter the closed form
LEAST_SEGMENTS = 0.3
LEARNING_RATE = 0.015
# windows a step looks at
BATCH = 2
# the slope is fitted per this many positions, so that it has the size of the other weights
SLOPE_UNIT = 1024


@dataclass(frozen=True)
class SolveSettings:
    """How a layer is fitted.

    Attributes:
        shares: budgets the fit is for, as shares of the context.
        split: of the budgets.
        hidden_units: width of the MLP, or 0 for a linear scorer.
        steps: of gradient descent; 0 leaves the closed form.
        seed: order of windows and start of the MLP.
    """

    shares: tuple[float, ...] = (0.12, 0.25, 0.5)
    split: Split = field(default_factory=Split)
    hidden_units: int = 0
    steps: int = 60
    seed: int = 0


class LayerScorer(torch.nn.Module):
    """The scorer being fitted: linear plus, if asked for, a ReLU MLP, per KV head.

    Parameters see normalised features; ``tensors`` folds the normalisation into them.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, hidden_units: int, seed: int) -> None:
        super().__init__()
        heads, width = mean.shape
        self.hidden_units = hidden_units
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        new = mean.new_zeros
        self.weight = torch.nn.Parameter(new(heads, width))
        self.bias = torch.nn.Parameter(new(heads))
        self.slope = torch.nn.Parameter(new(heads))
        if hidden_units:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(heads, width, hidden_units, generator=generator)
            self.w1 = torch.nn.Parameter(start.to(mean.device) / math.sqrt(width))
            self.b1 = torch.nn.Parameter(new(heads, 1, hidden_units))
            self.w2 = torch.nn.Parameter(new(heads, hidden_units, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of normalised features: [H, W, n, F] -> [H, W, n]."""
        heads, windows, n, _ = x.shape
        position = torch.arange(n, device=x.device) / SLOPE_UNIT
        flat = x.flatten(1, 2)
        score = torch.bmm(flat, self.weight[..., None])
        if self.hidden_units:
            score = score + torch.baddbmm(self.b1, flat, self.w1).relu() @ self.w2
        score = score.view(heads, windows, n) + self.bias[:, None, None]
        return score + self.slope[:, None, None] * position

    def normalise(self, features: torch.Tensor) -> torch.Tensor:
        """Features [H, W, n, F] as ``forward`` takes them."""
        return (features - self.mean[:, None, None]) / self.std[:, None, None]

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The layer's tensors of a scorer file (see ``scorers.scorer_file``)."""
        weight = self.weight / self.std
        bias = self.bias - (weight * self.mean).sum(-1)
        slope = self.slope / SLOPE_UNIT
        if not self.hidden_units:
            return {"weight": weight, "bias": bias, "slope": slope}
        w1 = (self.w1 / self.std[..., None]).transpose(1, 2)
        b1 = self.b1[:, 0] - (w1 * self.mean[:, None]).sum(-1)
        # the linear part as two more hidden units: x = relu(x) - relu(-x)
        return {
            "w1": torch.cat([w1, weight[:, None], -weight[:, None]], 1),
            "b1": torch.cat([b1, torch.zeros_like(b1[:, :2])], 1),
            "w2": torch.cat([self.w2[..., 0], *(sign * torch.ones_like(b1[:, :1])
                                                for sign in (1, -1))], 1),
            "b2": bias,
            "slope": slope,
        }  # fmt: skip


def normalised(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [H, W, n, F] with mean 0 and deviation 1, and both [H, F]."""
    mean = features.mean((1, 2))
    std = features.std((1, 2)) + 1e-4
    return (features - mean[:, None, None]) / std[:, None, None], mean, std


def closed_form(
    x: torch.Tensor, targets: Targets, gap: int, answer_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ridge regression of the logarithm of a token's attention, relative to uniform.

    Args:
        x: [H, W, n, F] normalised features.
        targets: of the same windows; gap: see ``capture.CaptureSettings``.
        answer_weight: weight of ``targets.answers``.

    Returns:
        weight [H, F], bias [H], slope [H] per ``SLOPE_UNIT`` positions.
    """
    heads, _, n, _ = x.shape
    segments = targets.mass.shape[1]
    position = torch.arange(n, device=x.device)
    first = torch.arange(segments, device=x.device) * targets.segment
    # of every segment, the share of queries that lie at least gap behind the token
    measured = (first[:, None] + targets.segment - position - gap).clamp(0, targets.segment)
    measured = measured.sum(0) / targets.segment  # [n]
    relative = (targets.mass * (first + targets.segment / 2)[:, None, None]).sum(1)  # [W, H, n]
    relative = relative / measured.clamp_min(0.1) + answer_weight * n * targets.answers
    y = torch.log(relative + FLOOR).transpose(0, 1)  # [H, W, n]
    use = measured >= LEAST_SEGMENTS
    slope = (position[use] / SLOPE_UNIT).expand(*x.shape[:2], -1)[..., None]
    design = torch.cat([x[:, :, use], torch.ones_like(slope), slope], -1).flatten(1, 2)
    target = y[:, :, use].flatten(1)[..., None]
    # keys before and after rotation are nearly dependent: long float32 sums would not do
    rows = zip(design.split(SUM_ROWS, 1), target.split(SUM_ROWS, 1), strict=True)
    sums = [(a.transpose(1, 2) @ torch.cat([a, b], -1)).double() for a, b in rows]
    gram, moment = torch.stack(sums).sum(0).split([design.shape[-1], 1], -1)
    gram = gram + RIDGE * design.shape[1] * torch.eye(gram.shape[-1], device=x.device)
    # head by head: a batched solve is wrong in some builds of MKL
    solution = torch.stack(
        [
            torch.cholesky_solve(moment[h], torch.linalg.cholesky(gram[h]))[:, 0]
            for h in range(heads)
        ]
    ).float()
    return solution[:, :-2], solution[:, -2], solution[:, -1]


def fit_layer(
    features: torch.Tensor, targets: Targets, gap: int, settings: SolveSettings
) -> tuple[LayerScorer, list[float]]:
    """Fit one layer's scorer.

    Args:
        features: [H, W, n, F] float32.
        targets: of the same windows.
        gap: least distance of the tokens that ``targets`` counts.
        settings: how.

    Returns:
        the scorer and the loss of every round of budgets: a step takes one, in turn.
    """
    x, mean, std = normalised(features)
    scorer = LayerScorer(mean, std, settings.hidden_units, settings.seed)
    weight, bias, slope = closed_form(x, targets, gap, settings.split.answer_weight / 10)
    scorer.weight.data, scorer.bias.data, scorer.slope.data = weight, bias, slope
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        chosen = torch.randperm(x.shape[1], generator=generator)[:BATCH].to(x.device)
        part = Targets(targets.mass[chosen], targets.answers[chosen], targets.segment)
        # one budget a step, in turn: a step costs what one budget costs
        share = settings.shares[step % len(settings.shares)]
        loss = dropped(scorer(x[:, chosen]), part, (share,), settings.split)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    rounds = range(0, len(losses), len(settings.shares))
    means = [fmean(losses[low : low + len(settings.shares)]) for low in rounds]
    return scorer, means
