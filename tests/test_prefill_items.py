"""What the metadata builder makes of prefill rows: items, their bases, requests read densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparsek import compat
from vllm_sparsek.attention.metadata import (
    LEAST_PER_BASE,
    SparseKMetadataBuilder,
    dense_requests,
)
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


def test_bases_begin_and_end_with_items_of_one_row(builder):
    items = items_of(builder, [(70, 131), (200, 264), (0, 40)], sparse_from=30)
    # five items, five, two
    assert items.bases.item_base.tolist() == [0] * 4 + [1] + [2] * 4 + [3] + [4] * 2
    expected = [[0, 64, 112], [0, 128, 128], [1, 192, 240], [1, 256, 256], [2, 16, 32]]
    assert items.bases.bounds.tolist() == expected
    assert items.bases.longest == 256
    assert items.bases.span == 48


def test_about_the_root_of_a_rows_items_share_a_base(builder):
    items = items_of(builder, [(320, 320 + 36 * R)])
    assert items.bases.item_base.tolist() == [i // 6 for i in range(36)]


@pytest.mark.parametrize(("share_bases", "items"), [(False, LEAST_PER_BASE), (True, 3)])
def test_no_base_is_made_where_none_is_used_or_too_few_items_share_it(builder, share_bases, items):
    builder.share_bases = share_bases
    found = items_of(builder, [(320, 320 + items * R)])
    assert found.row.numel() == items
    assert found.bases is None


def test_queries_that_read_sparsely_are_requests_of_their_own_for_the_dense_path():
    # decode rows, dense and sparse; a prompt that becomes sparse at 30; prompts wholly one or other
    chunks = [(20, 21), (99, 100), (10, 50), (0, 30), (64, 80), (30, 30)]
    starts, ends = (np.array(part) for part in zip(*chunks, strict=True))
    in_batch = np.concatenate([[0], (ends - starts).cumsum()])
    begin, length, row = dense_requests(in_batch, ends, np.full(len(ends), 30))
    assert begin.tolist() == [0, 1, 2, 22, 42, 72, 88]
    assert length.tolist() == [21, 0, 30, 0, 30, 0]
    assert row.tolist() == [0, 1, 2, 2, 3, 4]


def test_dense_queries_beyond_the_budget_are_cut_off_like_those_within_it(builder):
    # the budget ends at 68, 4/3 of it is 91: within a chunk and within a refresh block
    first = builder.config.first_sparse_position(16, 1024)
    assert (builder.budget.first_sparse_position(1024), first) == (80, 91)
    chunks = [(0, 100), (85, 95), (90, 91), (91, 92)]
    items = items_of(builder, chunks, sparse_from=first)
    assert items.row.tolist() == [0, 0, 1, 3]
    assert items.position.tolist() == [91, 96, 91, 91]
    assert items.query_len.tolist() == [5, 4, 4, 1]
    starts, ends = (np.array(part) for part in zip(*chunks, strict=True))
    in_batch = np.concatenate([[0], (ends - starts).cumsum()])
    begin, length, row = dense_requests(in_batch, ends, np.full(len(ends), first))
    assert np.diff(begin).tolist() == [91, 9, 6, 4, 1, 1]
    assert length.tolist() == [91, 0, 91, 0, 91, 0]
    assert row.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_batch_is_cut_into_requests():
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 41, 57], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 41, 57], dtype=torch.int32),
        seq_lens=torch.tensor([21, 50, 80], dtype=torch.int32), num_reqs=3, num_actual_tokens=57,
        max_query_len=40, max_seq_len=80, block_table_tensor=table,
        slot_mapping=torch.arange(57),
    )  # fmt: skip
    starts, lengths, rows = np.array([0, 1, 21, 41, 57]), np.array([21, 30, 0, 0]), [0, 1, 1, 2]
    found = compat.with_requests(common, starts, lengths, np.array(rows))
    assert found.num_reqs == 4
    assert found.num_actual_tokens == 57
    assert (found.max_query_len, found.max_seq_len) == (20, 30)
    assert found.query_start_loc.tolist() == found.query_start_loc_cpu.tolist() == starts.tolist()
    assert found.query_start_loc.dtype == found.seq_lens.dtype == torch.int32
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist() == lengths.tolist()
    assert torch.equal(found.block_table_tensor, table[rows])
