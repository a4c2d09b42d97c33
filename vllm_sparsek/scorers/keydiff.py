"""Keys unlike the ones before them are kept: a causal form of KeyDiff (Park et al., "KeyDiff:
Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference", arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_sparsek.scorers.base import ScoreBatch, Scorer


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

    def write(self, batch: ScoreBatch) -> None:
        """See ``Scorer.write``."""
        from vllm_sparsek.kernels.score import api

        assert batch.scores is not None and batch.anchors is not None
        api.keydiff(
            batch.kv_cache, batch.block_table, batch.query_start_loc, batch.seq_lens,
            batch.scores, batch.anchors,
        )  # fmt: skip
