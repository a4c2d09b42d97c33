"""How much of the budget each layer and each of its KV heads should get, at an equal total.

A layer's damage is taken as proportional to the attention its heads drop. What a head drops at
any budget is known from the captured windows; the factor is measured: the divergence of the
model's next-token distribution when that layer alone is sparse. Places are then given, a step at
a time, to the head (or, with one budget a layer, to the layer) where they lower damage most. Where
a GPU makes it cheap, the damage of every head alone can be measured instead, at several budgets.
Which split is best depends on the model, so all of them are tried on windows held out. That heads
of one layer need different budgets is Ada-KV's observation (Feng et al., arXiv 2407.11550).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.capture import (
    Hook,
    attention_hook,
    layer_inputs,
    outputs_kept,
    outputs_replayed,
)
from vllm_sparsek.training.data import Window
from vllm_sparsek.training.divergence import NextTokens, divergence
from vllm_sparsek.training.objective import Split, Targets, competitions
from vllm_sparsek.training.sparse import dense_attention, sparse_attention

Score = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# a head keeps at least this share of its even part
LEAST_SHARE = 0.25
# and at most this multiple: a layer whose heads need more is better made dense by hand
MOST_SHARE = 4.0
# places are given in this many steps a head
STEPS = 64
# points of the curve of dropped attention
POINTS = 17
# heads are measured at these parts of the even one
PARTS = [0.125, 0.5, 2.0]


def curve(scores: torch.Tensor, targets: Targets, share: float, split: Split) -> torch.Tensor:
    """Attention to far tokens dropped by heads that keep 0 .. ``MOST_SHARE`` even parts.

    Args:
        scores: [H, W, n]; targets: of the same windows; share: the budget; split: of it.

    Returns:
        [H, POINTS] float64, see ``allocate``.
    """
    total = torch.zeros(scores.shape[0], POINTS, dtype=torch.float64)
    for c in competitions(targets.mass.shape[1], targets.segment, (share,), split):
        order = scores[..., c.first : c.end].argsort(-1, descending=True)
        paid = targets.mass[:, c.segment, :, c.first : c.end].transpose(0, 1).gather(-1, order)
        left = torch.cat([torch.zeros_like(paid[..., :1]), paid.cumsum(-1)], -1)
        left = left[..., -1:] - left
        for point in range(POINTS):
            kept = min(round(c.k * MOST_SHARE * point / (POINTS - 1)), c.end - c.first)
            total[:, point] += left[..., kept].mean(-1).cpu()
    return total


@torch.inference_mode()
def measure_damage(
    model: Any,
    windows: list[Window],
    score: Score,
    hidden: bool,
    layers: list[int],
    budgets: list[Budget],
    by_head: bool,
    tick: Callable[[], None],
) -> torch.Tensor:
    """Divergence of the model's next token from the dense one when one place alone is sparse.

    Args:
        model: from ``capture.load_model``.
        windows: what is read.
        score: (layer, key, value [T, H, D], hidden [T, E] or None) -> scores [T, H].
        hidden: whether ``score`` reads hidden states.
        layers: which.
        budgets: to measure at.
        by_head: a place is a KV head, not a layer.
        tick: called after every layer of every window.

    Returns:
        ``divergence``, on average over the windows: [layers, heads, budgets] float64, of layers
        with one head.
    """
    found: list[list[list[list[float]]]] = []
    for window in windows:
        tokens = NextTokens(model, window, min(budgets, key=lambda budget: budget.k))
        with outputs_kept(model) as outputs:
            dense = tokens.predict()
        found.append([])
        for layer in layers:
            heads = range(_kv_heads(model)) if by_head else [None]
            found[-1].append([])
            for head in heads:
                found[-1][-1].append([])
                for budget in budgets:
                    # the layers before it do what they did
                    unchanged = outputs_replayed(model, outputs, layer)
                    with layer_inputs(model, hidden) as inputs, unchanged:
                        only = _only(layer, head, score, inputs, budget)
                        with attention_hook(only):
                            lost = divergence(dense, tokens.predict())
                    found[-1][-1][-1].append(max(0.0, lost.item()))
            tick()
    return torch.tensor(found, dtype=torch.float64).mean(0)


def _kv_heads(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _only(
    layer: int, head: int | None, score: Score, inputs: dict[int, torch.Tensor], budget: Budget
) -> Hook:
    """Sparse attention of one layer, or of one of its KV heads."""

    def attend(
        at: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        if at != layer:
            return None
        scores = score(at, key.transpose(0, 1), value.transpose(0, 1), inputs.get(at)).T
        if head is None:
            return sparse_attention(query, key, value, scores, budget, scale)
        out = dense_attention(query, key, value, scale)
        group = query.shape[0] // key.shape[0]
        rows, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        out[rows] = sparse_attention(query[rows], key[own], value[own], scores[own], budget, scale)
        return out

    return attend


@torch.inference_mode()
def measure_splits(
    model: Any,
    windows: list[Window],
    score: Score,
    hidden: bool,
    budgets: list[list[dict[int, Budget]]],
    tick: Callable[[], None],
) -> list[list[float]]:
    """Divergence of the model's next token from the dense one with everything sparse.

    Args:
        model, windows, score, hidden: see ``measure_damage``.
        budgets: several splits of several totals: what every layer reads.
        tick: called after every split and total of every window.

    Returns:
        of every split, for every total, the average over the windows.
    """
    found = [[0.0] * len(totals) for totals in budgets]
    for window in windows:
        # all are judged by the queries that the smallest budget makes sparse
        least = min(
            (b for totals in budgets for total in totals for b in total.values()),
            key=lambda budget: min(k for k, _ in budget.heads or [(budget.k, None)]),
        )
        least = replace(least, k=min(k for k, _ in least.heads or [(least.k, None)]), heads=())
        tokens = NextTokens(model, window, least)
        dense = tokens.predict()
        for split, totals in enumerate(budgets):
            for at, total in enumerate(totals):
                with layer_inputs(model, hidden) as inputs:

                    def attend(
                        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        scale: float, total: dict[int, Budget] = total,
                        inputs: dict[int, torch.Tensor] = inputs,
                    ) -> torch.Tensor | None:  # fmt: skip
                        if layer not in total:
                            return None
                        scores = score(layer, key.transpose(0, 1), value.transpose(0, 1),
                                       inputs.get(layer))  # fmt: skip
                        return sparse_attention(query, key, value, scores.T, total[layer], scale)

                    with attention_hook(attend):
                        lost = divergence(dense, tokens.predict())
                found[split][at] += max(0.0, lost.item()) / len(windows)
                tick()
    return found


def allocate(dropped: torch.Tensor, damage: torch.Tensor, by_head: bool = True) -> torch.Tensor:
    """Relative budgets of layers' KV heads with mean 1.

    Args:
        dropped: [layers, H, points] attention each head drops when it keeps 0, 1/c, 2/c .. of the
            competing tokens that an even split gives it, up to ``MOST_SHARE`` times as many:
            point p is p * MOST_SHARE / (points - 1) times the even part.
        damage: [layers] measured damage of each layer alone at the even part, at least 0.
        by_head: else all heads of a layer get the same.

    Returns:
        [layers, H] float32.
    """
    layers, heads, points = dropped.shape
    at = torch.linspace(0, MOST_SHARE, points, dtype=torch.float64)
    share = torch.arange(0, int(MOST_SHARE * STEPS) + 1, dtype=torch.float64) / STEPS
    # linear interpolation of every head's curve at the steps
    right = torch.searchsorted(at, share).clamp(1, points - 1)
    weight = (share - at[right - 1]) / (at[right] - at[right - 1])
    curve = dropped.double()
    curve = curve[..., right - 1] * (1 - weight) + curve[..., right] * weight
    even = curve[..., STEPS].sum(1).clamp_min(1e-9)
    harm = curve / even[:, None, None] * damage.double()[:, None, None]
    if by_head:
        return give(harm.flatten(0, 1), LEAST_SHARE, MOST_SHARE).view(layers, heads)
    return give(harm.sum(1), LEAST_SHARE, MOST_SHARE)[:, None].repeat(1, heads)


def allocate_measured(
    damage: torch.Tensor, parts: list[float], everything: float, totals: list[float], most: float
) -> torch.Tensor:
    """Relative budgets of layers' KV heads with mean 1, from the damage of each head alone.

    Between two budgets measured, damage is taken to be a power of the budget; beyond the largest it
    falls in a line, to nothing where a head keeps everything.

    Args:
        damage: [layers, H, budgets] of every head alone when it keeps so many ``parts``.
        parts: ascending, of the even part of the first total.
        everything: the part that is the whole context.
        totals: budgets that the split is to serve, relative to the first; all count the same.
        most: largest share of a head, ``1 / most`` the smallest.

    Returns:
        [layers, H] float32.
    """
    layers, heads, _ = damage.shape
    # more never does more damage, but for rounding
    flat = damage.double().flatten(0, 1).cummin(1).values.clamp_min(1e-9)
    at = torch.tensor(parts, dtype=torch.float64)
    share = torch.arange(0, int(most * STEPS) + 1, dtype=torch.float64) / STEPS
    harm = torch.zeros(len(flat), len(share), dtype=torch.float64)
    for total in totals:
        kept = (share * total).clamp_min(parts[0])
        right = torch.searchsorted(at, kept).clamp(1, len(at) - 1)
        low, high = at[right - 1].log(), at[right].log()
        weight = (kept.log() - low) / (high - low)
        own = (flat[:, right - 1].log() * (1 - weight) + flat[:, right].log() * weight).exp()
        rest = ((everything - kept) / (everything - parts[-1])).clamp(0, 1)
        own = torch.where(kept > parts[-1], flat[:, -1:] * rest, own)
        harm += own / own[:, STEPS].sum()
    return give(convex(harm), 1 / most, most).view(layers, heads)


def convex(curves: torch.Tensor) -> torch.Tensor:
    """The largest convex functions that lie nowhere above some [n, points]."""
    found = curves.clone()
    for values, out in zip(curves.tolist(), found, strict=True):
        corners: list[int] = []
        for i in range(len(values)):
            while len(corners) > 1:
                a, b = corners[-2:]
                if (values[b] - values[a]) * (i - b) < (values[i] - values[b]) * (b - a):
                    break
                corners.pop()
            corners.append(i)
        for a, b in pairwise(corners):
            line = torch.linspace(values[a], values[b], b - a + 1, dtype=torch.float64)
            out[a : b + 1] = line
    return found


def give(harm: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """Relative budgets with mean 1 that do the least harm.

    Args:
        harm: [n, points] of every one when it has 0, 1, 2 .. ``STEPS``-ths of the even part.
        least, most: bounds of a budget.

    Returns:
        [n] float32, multiples of ``1 / STEPS``.
    """
    harm = harm[:, : int(most * STEPS) + 1]
    # what one step more spares each; -1: it has all it may have
    gains = torch.nn.functional.pad(harm[:, :-1] - harm[:, 1:], (0, 1), value=-1.0)
    given = torch.full((len(harm),), int(least * STEPS))
    offers = gains.gather(1, given[:, None])[:, 0]
    for _ in range(STEPS * len(harm) - int(given.sum())):
        taker = int(offers.argmax())
        given[taker] += 1
        offers[taker] = gains[taker, given[taker]]
    return given.float() / STEPS
