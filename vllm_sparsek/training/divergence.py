"""What sparse attention changes about a model's next tokens."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.training.data import Window

# every how many tokens one is looked at
STRIDE = 8
# what the answers' divergence counts beside that of all tokens
ANSWER_WEIGHT = 0.25


class NextTokens:
    """The next-token distributions of one window that are compared.

    Those of every ``STRIDE``-th query that can be sparse, and of all that predict an answer.
    """

    def __init__(self, model: Any, window: Window, budget: Budget) -> None:
        """model: from ``capture.load_model``; window: what is read; budget: of sparse layers."""
        self.model = model
        self.ids = torch.tensor(window.ids, device=model.device)[None]
        n = self.ids.shape[1]
        first = budget.first_sparse_position(n)
        self.rows = [torch.arange(first, n, STRIDE, device=model.device)]
        answers = [p for low, end in window.answers for p in range(low, end)]
        if answers:
            self.rows.append(torch.tensor(answers, device=model.device))

    def predict(self) -> list[torch.Tensor]:
        """Logarithms of probabilities [m, vocabulary] of all tokens and, if any, of answers."""
        states = self.model.get_decoder()(input_ids=self.ids, use_cache=False).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        return [head(states[row]).float().log_softmax(-1) for row in self.rows]


def divergence(dense: list[torch.Tensor], sparse: list[torch.Tensor]) -> torch.Tensor:
    """KL divergence of ``predict``'s results in nats, a number.

    That of all tokens plus ``ANSWER_WEIGHT`` times that of answers.
    """
    found = [(d.exp() * (d - s)).sum(-1).mean() for d, s in zip(dense, sparse, strict=True)]
    return found[0] + ANSWER_WEIGHT * sum(found[1:])
