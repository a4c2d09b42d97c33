"""Refinement: a fitted scorer trained on by what its selections do to the model.

Both objectives differentiate ``soft.soft_attention`` with respect to the scorers' parameters and
nothing else: a token's features are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.capture import attention_hook, layer_inputs, layers_recomputed
from vllm_sparsek.training.data import Window
from vllm_sparsek.training.divergence import NextTokens, divergence
from vllm_sparsek.training.soft import soft_attention, soft_causal
from vllm_sparsek.training.solve import LayerScorer

OUTPUTS_RATE, LOGITS_RATE = 0.005, 0.01
# steps that take windows of every kind, see ``data.refinement_window``
KINDS = 4
# queries a step of output reconstruction looks at
QUERIES = 32


@dataclass(frozen=True)
class Sampled:
    """Attention of one layer in one window at some of its queries; see ``capture.Layer``.

    Attributes:
        asks: [m] bool: queries that predict an answer.
    """

    query: torch.Tensor
    at: torch.Tensor
    output: torch.Tensor
    asks: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def _anneal(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def _some(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """At most ``QUERIES`` of the places where ``mask`` holds."""
    places = mask.nonzero()[:, 0]
    return places[torch.randperm(len(places), generator=generator)[:QUERIES].to(places.device)]


def refine_outputs(
    scorer: LayerScorer,
    features: torch.Tensor,
    windows: list[Sampled],
    project: Callable[[torch.Tensor], torch.Tensor],
    budgets: list[Budget],
    scale: float,
    steps: int,
    seed: int,
) -> list[float]:
    """Train one layer's scorer to reconstruct what the layer's dense attention puts out.

    Args:
        scorer: fitted; changed in place.
        features: [H, W, n, F] float32, not normalised.
        windows: W of them.
        project: the layer's output projection, [m, Hq * D] -> [m, E].
        budgets: a step takes one, in turn; those that drop nothing or keep nothing are left out.
        scale: softmax scale; steps: number of steps; seed: order of windows and queries.

    Returns:
        the loss of every step: squared error of the output relative to its square, that of
        answers added to that of other queries.
    """
    x = scorer.normalise(features)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=OUTPUTS_RATE)
    losses: list[float] = []
    n = features.shape[2]
    budgets = [b for b in budgets if b.k >= 1 and b.first_sparse_position(n) < n]
    for step in range(steps if budgets else 0):
        _anneal(optimizer, OUTPUTS_RATE, step, steps)
        index = int(torch.randint(len(windows), (), generator=generator))
        window, budget = windows[index], budgets[step % len(budgets)]
        sparse = window.at >= budget.first_sparse_position(n)
        chosen = [_some(sparse & kind, generator) for kind in (window.asks, ~window.asks)]
        rows = torch.cat(chosen).sort().values
        scores = scorer(x[:, index : index + 1])[:, 0]
        output = soft_attention(
            window.query[:, rows], window.at[rows], window.key, window.value, scores, budget, scale
        )
        found, wanted = (
            project(o.transpose(0, 1).flatten(1)).float() for o in (output, window.output[:, rows])
        )
        error, power = (found - wanted).pow(2).sum(-1), wanted.pow(2).sum(-1)
        # all answers of a window count as much as all its other queries
        asks = window.asks[rows]
        kinds = [kind for kind in (asks, ~asks) if kind.any()]
        loss = torch.stack([error[kind].sum() / power[kind].sum() for kind in kinds]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# (key, value [H, n, D], hidden [n, E] or None) -> [H, n, F] float32
Features = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class LogitsRefinement:
    """Trains the scorers of all layers by what the model's next tokens lose.

    Attributes:
        losses: of every step so far: ``divergence`` from dense with all layers sparse.
    """

    def __init__(
        self,
        model: Any,
        scorers: Mapping[int, LayerScorer],
        features: Features,
        hidden: bool,
        budgets: Sequence[Budget],
        steps: int,
    ) -> None:
        """Begin.

        Args:
            model: from ``capture.load_model``.
            scorers: by layer, fitted; changed in place.
            features: what they read.
            hidden: whether ``features`` reads hidden states.
            budgets: of every layer, for the windows that ``step`` gets: each for as many steps
                as there are kinds of windows, in turn.
            steps: how many there will be.
        """
        self.model, self.scorers, self.features = model, scorers, features
        self.hidden, self.budgets, self.steps = hidden, budgets, steps
        self.losses: list[float] = []
        self.parameters = [
            parameter for layer in sorted(scorers) for parameter in scorers[layer].parameters()
        ]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LOGITS_RATE)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that ``load`` needs, beside ``losses``, to go on from here."""
        found = {f"{i}.parameter": parameter.data for i, parameter in enumerate(self.parameters)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            found.update({f"{i}.{name}": moment for name, moment in moments.items()})
        return found

    def load(self, state: Mapping[str, torch.Tensor], losses: list[float]) -> None:
        """Go on from what ``state`` and ``losses`` were."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            index, _, kind = name.partition(".")
            if kind == "parameter":
                self.parameters[int(index)].data.copy_(tensor)
            else:
                moments.setdefault(int(index), {})[kind] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.losses = list(losses)

    def step(self, window: Window) -> None:
        """One step of gradient descent on one window."""
        _anneal(self.optimizer, LOGITS_RATE, len(self.losses), self.steps)
        self.optimizer.zero_grad()
        self.losses.append(self._backward(window))
        # gradients of two windows can differ a hundredfold: Adam would live on the few largest
        for scorer in self.scorers.values():
            found = [p.grad for p in scorer.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(found).clamp_min(torch.finfo(torch.float32).tiny)
            torch._foreach_div_(found, norm)
        self.optimizer.step()

    def _backward(self, window: Window) -> float:
        """Add the gradient of a window's loss, and return the loss."""
        budget = self.budgets[len(self.losses) // KINDS % len(self.budgets)]
        tokens = NextTokens(self.model, window, budget)

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
        ) -> torch.Tensor | None:
            if layer not in self.scorers:
                return None
            scorer = self.scorers[layer]
            with torch.no_grad():
                x = scorer.normalise(self.features(key, value, inputs.get(layer))[:, None])
            return soft_causal(query, key, value, scorer(x)[:, 0], budget, scale)

        with torch.no_grad():
            dense = tokens.predict()
        hooks = attention_hook(attend), layers_recomputed(self.model)
        with layer_inputs(self.model, self.hidden) as inputs, hooks[0], hooks[1]:
            loss = divergence(dense, tokens.predict())
            # in here: the layers run again, and attend as they did
            loss.backward()
        return loss.item()
