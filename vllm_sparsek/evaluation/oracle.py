"""The forced-needle oracle: keeps what the answer stands in. A ceiling, not a scorer to serve with.

It knows the needles of the one request that runs, so it exists only inside an evaluation's engine,
which then takes one request at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_sparsek.scorers import SCORERS
from vllm_sparsek.scorers.base import Scorer

NAME = "oracle"
# above every position, and exact in float32 together with one
_FORCED = 2.0**23


def register() -> None:
    """Add the oracle to this process's scorers."""
    SCORERS[NAME] = f"{__name__}.{OracleScorer.__name__}"


@dataclass(frozen=True)
class OracleScorer(Scorer):
    """Needles first, then the latest tokens.

    Attributes:
        spans: [start, stop) positions of the needles of the request that runs.
    """

    spans: ClassVar[tuple[tuple[int, int], ...]] = ()

    @classmethod
    def force(cls, spans: Iterable[Iterable[int]]) -> None:
        """Name the needles of the next request."""
        cls.spans = tuple((start, stop) for start, stop in spans)

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See ``Scorer.score``."""
        scores = positions.float()
        for start, stop in self.spans:
            scores = scores + _FORCED * ((positions >= start) & (positions < stop))
        return scores[:, None].repeat(1, key.shape[1])
