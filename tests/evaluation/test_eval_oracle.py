"""The oracle keeps the needles, then the latest tokens."""

import pytest
import torch

from vllm_sparsek.evaluation.oracle import OracleScorer


@pytest.fixture
def scorer():
    yield OracleScorer()
    OracleScorer.force([])


@pytest.mark.parametrize("end", [100, 131072], ids=["short", "128k"])
def test_needles_score_above_every_other_token_and_the_latest_come_next(scorer, end):
    scorer.force([[3, 6], [40, 41]])
    positions = torch.arange(end, dtype=torch.int32)
    nothing = torch.empty(end, 2, 64)
    scores = scorer.score(nothing, nothing, positions)
    assert scores.shape == (end, 2)
    assert scores.dtype == torch.float32
    best = scores[:, 1].topk(6).indices.tolist()
    assert best == [40, 5, 4, 3, end - 1, end - 2]
    assert len(set(scores[:, 0].tolist())) == end


def test_the_next_request_has_needles_of_its_own(scorer):
    scorer.force([[3, 6]])
    scorer.force([[7, 8]])
    key = torch.empty(10, 1, 64)
    scores = scorer.score(key, key, torch.arange(10, dtype=torch.int32))
    assert scores[:, 0].topk(2).indices.tolist() == [7, 9]
