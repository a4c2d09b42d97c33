"""What a scorer is: one static number for every new token and KV head, or bounds of keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ScoreBatch:
    """The new tokens of one step in one layer, and where their scores go.

    Attributes:
        key, value: [T, H, D] in the model's dtype; keys are rotated.
        positions: [T] int32 absolute positions.
        slot_mapping: [>= T] int64 physical slots, -1 for padding.
        kv_cache: [num_blocks, H, page, 2 * D], the new tokens already written unless the scorer
            ``writes_kv``; of an fp8 cache the float8_e4m3fn numbers before their scale.
        block_table: [rows, max_blocks] int32.
        query_start_loc: [rows + 1] int32; seq_lens: [rows] int32.
        scores: [num_blocks, H, page] float32, to be written; None for a query-aware scorer.
        anchors: [num_blocks, H, D] float32 or None, see ``Scorer.needs_anchor``.
        hidden: [T, E] in the model's dtype or None, see ``Scorer.reads_hidden``.
        bounds: [num_blocks, H, page // unit, 2, D] in kv_cache's dtype or None, see
            ``Scorer.query_aware``.
        kv_scales: k_scale, v_scale of an fp8 cache.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scores: torch.Tensor | None
    anchors: torch.Tensor | None
    hidden: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None


class Scorer(ABC):
    """Scores tokens by themselves: never by a query, so a score is final when written.

    Most scorers implement ``score``; one that needs more than the token itself overrides
    ``write``.
    """

    # fitted to a model; without one, prefill stays dense by default
    trained: ClassVar[bool] = False
    # keeps a running sum of unit keys per page beside the scores
    needs_anchor: ClassVar[bool] = False
    # writes bounds of keys instead of scores: every decode step selects by its own query
    query_aware: ClassVar[bool] = False

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads what goes into the layer's query/key/value projection."""
        return False

    @property
    def writes_kv(self) -> bool:
        """Whether ``write`` also writes the new tokens' keys and values into the KV cache."""
        return False

    @abstractmethod
    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Scores of tokens: key, value [T, H, D], positions [T] -> [T, H] float32."""

    def score_rows(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Scores of whole contexts from position 0: key, value [B, H, S, D] -> [B, H, S] float32.

        For tensors outside the paged cache. One row at a time, which bounds the scratch memory.
        """
        positions = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
        scores = [
            self.score(k.transpose(0, 1), v.transpose(0, 1), positions).T
            for k, v in zip(key, value, strict=True)
        ]
        return torch.stack(scores) if scores else key.new_empty(key.shape[:3], dtype=torch.float32)

    def write(self, batch: ScoreBatch) -> None:
        """Score the new tokens of a batch into the score cache."""
        from vllm_sparsek.kernels.score import api

        assert batch.scores is not None
        scores = self.score(batch.key, batch.value, batch.positions)
        api.write_scores(scores, batch.slot_mapping, batch.scores)
