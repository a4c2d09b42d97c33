"""Keys unlike the ones before them are kept: a causal form of KeyDiff (Park et al., "KeyDiff:
Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference", arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vllm_sparsek.scorers.base import ScoreBatch, Scorer

# tokens of a page where there is no paged cache: vLLM's block on CUDA
ROWS_PAGE = 16
LEAST_NORM = 1e-6


@dataclass(frozen=True)
class KeyDiffScorer(Scorer):
    """Minus the cosine between a key and the mean direction of all keys in earlier pages.

    KeyDiff compares with the mean over the whole cache. Here the mean ends with the page
    before the token's own, so that a score never changes and never depends on how a prompt
    was chunked.
    """

    needs_anchor: ClassVar[bool] = True

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Not defined without the keys of earlier pages: use ``write``."""
        raise NotImplementedError("keydiff scores a token against the pages before it: use write")

    def score_rows(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``Scorer.score_rows``; pages are 16 tokens."""
        scores = [_score_row(k.float()) for k in key]
        return torch.stack(scores) if scores else key.new_empty(key.shape[:3], dtype=torch.float32)

    def write(self, batch: ScoreBatch) -> None:
        """See ``Scorer.write``."""
        from vllm_sparsek.kernels.score import api

        assert batch.scores is not None and batch.anchors is not None
        api.keydiff(
            batch.kv_cache, batch.block_table, batch.query_start_loc, batch.seq_lens,
            batch.scores, batch.anchors,
        )  # fmt: skip


def _score_row(key: torch.Tensor) -> torch.Tensor:
    """[H, S, D] float32 -> [H, S]; as ``kernels.score.reference.keydiff``."""
    tokens = key.shape[1]
    unit = key / key.norm(dim=-1, keepdim=True).clamp_min(LEAST_NORM)
    pages = F.pad(unit, (0, 0, 0, -tokens % ROWS_PAGE)).unflatten(1, (-1, ROWS_PAGE))
    before = F.pad(pages.sum(2).cumsum(1), (0, 0, 1, 0))[:, :-1]  # [H, pages, D]
    direction = before / before.norm(dim=-1, keepdim=True).clamp_min(LEAST_NORM)
    return -(pages * direction[:, :, None]).sum(-1).flatten(1)[:, :tokens]
