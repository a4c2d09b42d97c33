"""What the metadata builder makes of prefill rows: items of one selection each, and their bases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_sparsek.attention.metadata import LEAST_PER_BASE, SparseKMetadataBuilder
from vllm_sparsek.config import SparseKConfig

R = 16


@pytest.fixture
def builder():
    """A builder without an engine, with what it needs to cut rows into items."""
    builder = object.__new__(SparseKMetadataBuilder)
    builder.config = SparseKConfig(k=32, window=32, sinks=4, refresh=R, scorer="knorm")
    builder.budget = builder.config.budget(16)
    builder.device = torch.device("cpu")
    builder.share_bases = True
    return builder


def items_of(builder, chunks, decodes=0, sparse_from=0):
    """Items of rows that read [start, end), the first ``decodes`` of them one query each."""
    starts, ends = (np.array(part, dtype=np.int64) for part in zip(*chunks, strict=True))
    lens = ends - starts
    in_batch = np.concatenate([[0], lens.cumsum()])
    return builder._items(decodes, in_batch, lens, ends, np.full(len(ends), sparse_from))


def test_items_end_at_refresh_blocks_and_cover_every_sparse_query_once(builder):
    items = items_of(builder, [(99, 100), (70, 131), (0, 40)], decodes=1, sparse_from=30)
    assert items.row.tolist() == [1, 1, 1, 1, 1, 2, 2]
    assert items.position.tolist() == [70, 80, 96, 112, 128, 30, 32]
    assert items.query_len.tolist() == [10, 16, 16, 16, 3, 2, 8]
    # the decode row has one query, the second row 61
    assert items.query_start.tolist() == [1, 11, 27, 43, 59, 92, 94]


def test_rows_without_sparse_queries_have_no_items(builder):
    assert items_of(builder, [(0, 30), (5, 29)], sparse_from=30) is None


def test_every_row_has_a_base_from_its_first_to_its_last_refresh_block(builder):
    items = items_of(builder, [(70, 131), (200, 264), (0, 40)], sparse_from=30)
    assert items.bases.item_base.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    assert items.bases.bounds.tolist() == [[0, 64, 128], [1, 192, 256], [2, 16, 32]]
    assert items.bases.longest == 192


@pytest.mark.parametrize(("share_bases", "items"), [(False, LEAST_PER_BASE), (True, 3)])
def test_no_base_is_made_where_none_is_used_or_too_few_items_share_it(builder, share_bases, items):
    builder.share_bases = share_bases
    found = items_of(builder, [(320, 320 + items * R)])
    assert found.row.numel() == items
    assert found.bases is None
