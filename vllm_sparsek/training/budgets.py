"""How much of the budget each layer and each of its KV heads should get, at an equal total.

A layer's damage is taken as proportional to the attention its heads drop. What a head drops at
any budget is known from the captured windows; the factor is measured: the divergence of the
model's next-token distribution when that layer alone is sparse. Places are then given, a step at
a time, to the head where they lower its layer's damage most. That heads of one layer need
different budgets is Ada-KV's observation (Feng et al., arXiv 2407.11550).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.capture import (
    attention_hook,
    layer_inputs,
    outputs_kept,
    outputs_replayed,
)
from vllm_sparsek.training.data import Window
from vllm_sparsek.training.divergence import NextTokens, divergence
from vllm_sparsek.training.objective import Split, Targets, competitions
from vllm_sparsek.training.sparse import sparse_attention

Score = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# a head keeps at least this share of its even part
LEAST_SHARE = 0.25
# and at most this multiple: a layer whose heads need more is better made dense by hand
MOST_SHARE = 4.0
# places are given in this many steps a head
STEPS = 64
# points of the curve of dropped attention
POINTS = 17
# tokens of the window that damage is measured on
DAMAGE_TOKENS = 4096


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
    window: Window,
    score: Score,
    hidden: bool,
    layers: list[int],
    budget: Budget,
    tick: Callable[[], None],
) -> list[float]:
    """Divergence of the model's next token from the dense one when one layer alone is sparse.

    Args:
        model: from ``capture.load_model``.
        window: what is read.
        score: (layer, key, value [T, H, D], hidden [T, E] or None) -> scores [T, H].
        hidden: whether ``score`` reads hidden states.
        layers: which.
        budget: of every layer; tick: called after every layer.

    Returns:
        ``divergence`` of every layer.
    """
    tokens = NextTokens(model, window, budget)
    with outputs_kept(model) as outputs:
        dense = tokens.predict()
    damage = []
    for layer in layers:

        def only(at: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 scale: float, chosen: int = layer) -> torch.Tensor | None:  # fmt: skip
            if at != chosen:
                return None
            scores = score(at, key.transpose(0, 1), value.transpose(0, 1), inputs.get(at))
            return sparse_attention(query, key, value, scores.T, budget, scale)

        # the layers before it do what they did
        unchanged = outputs_replayed(model, outputs, layer)
        with layer_inputs(model, hidden) as inputs, attention_hook(only), unchanged:
            found = divergence(dense, tokens.predict())
        damage.append(max(0.0, found.item()))
        tick()
    return damage


def allocate(dropped: torch.Tensor, damage: torch.Tensor) -> torch.Tensor:
    """Relative budgets of layers' KV heads with mean 1.

    Args:
        dropped: [layers, H, points] attention each head drops when it keeps 0, 1/c, 2/c .. of the
            competing tokens that an even split gives it, up to ``MOST_SHARE`` times as many:
            point p is p * MOST_SHARE / (points - 1) times the even part.
        damage: [layers] measured damage of each layer alone at the even part, at least 0.

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
    harm = (curve / even[:, None, None] * damage.double()[:, None, None]).flatten(0, 1)
    # what one step more spares each head; -1: it has all it may have
    gains = torch.nn.functional.pad(harm[:, :-1] - harm[:, 1:], (0, 1), value=-1.0)
    given = torch.full((layers * heads,), int(LEAST_SHARE * STEPS))
    offers = gains.gather(1, given[:, None])[:, 0]
    for _ in range(STEPS * layers * heads - int(given.sum())):
        head = int(offers.argmax())
        given[head] += 1
        offers[head] = gains[head, given[head]]
    return given.view(layers, heads).float() / STEPS
