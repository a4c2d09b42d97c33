"""Pages are chosen by the query, step by step (Tang et al., "Quest: Query-Aware Sparsity for
Efficient Long-Context LLM Inference", arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_sparsek.scorers.base import ScoreBatch, Scorer


@dataclass(frozen=True)
class QuestScorer(Scorer):
    """Keeps the range of every unit's keys; the query says what it could match best.

    Nothing is fitted to the model, and nothing is given up before the query is known: that is
    what static scores lose retrieval by. For decode after a dense prefill.
    """

    query_aware: ClassVar[bool] = True

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Not defined without a query: use ``write``."""
        raise NotImplementedError("quest has no scores, it writes bounds of keys: use write")

    def write(self, batch: ScoreBatch) -> None:
        """Write the bounds of the units that the new tokens complete."""
        from vllm_sparsek.kernels.bounds import api

        assert batch.bounds is not None
        new = batch.slot_mapping[: batch.key.shape[0]]
        api.write_bounds(batch.kv_cache, new, batch.bounds)
