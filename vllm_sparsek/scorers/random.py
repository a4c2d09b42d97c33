"""Random scores, seeded by position: a floor for evaluations that any batch reproduces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparsek.scorers.base import Scorer


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """A hash of (seed, position, KV head), uniform in [0, 1)."""

    seed: int = 0

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See ``Scorer.score``."""
        heads = torch.arange(key.shape[1], device=key.device)
        x = positions.long()[:, None] * 0x9E3779B1 + heads * 0x85EBCA77 + self.seed * 0xC2B2AE3D
        # xorshift-multiply rounds; 32 bits kept at every step
        for multiplier in (0x7FEB352D, 0x846CA68B):
            x = ((x ^ ((x & 0xFFFFFFFF) >> 15)) & 0xFFFFFFFF) * multiplier & 0xFFFFFFFF
        return ((x ^ (x >> 16)) >> 8).float() / (1 << 24)
