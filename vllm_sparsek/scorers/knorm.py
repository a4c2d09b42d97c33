"""Keys of small norm are kept (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy
for KV Cache Compression", arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparsek.scorers.base import Scorer


@dataclass(frozen=True)
class KNormScorer(Scorer):
    """Minus the L2 norm of the key."""

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See ``Scorer.score``."""
        # without a float32 copy of the keys
        return -torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32)
