"""The latest tokens are kept: a larger sliding window, and a floor for evaluations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparsek.scorers.base import Scorer


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """The token's position (exact in float32 up to 2**24)."""

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See ``Scorer.score``."""
        return positions.float()[:, None].repeat(1, key.shape[1])
