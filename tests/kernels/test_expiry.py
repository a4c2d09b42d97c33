"""Selections of many items of a row by one walk: as each by itself, and the reference's."""

from __future__ import annotations

import pytest
import torch
from caches import build, items_of
from test_select import run

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import expiry, reference

HEADS = Budget(1, 16, 5, 16, 16).with_heads([(40, None), (3, None), (300, None)])
CASES = {
    # budget, lengths, KV heads, page, different scores (None: all)
    "pages": (Budget(48, 20, 3, 16, 16), [700, 163], 2, 16, None),
    "ties": (Budget(64, 20, 3, 16, 16), [700, 300], 2, 16, 3),
    "all-equal": (Budget(64, 20, 0, 16, 16), [500], 1, 16, 1),
    "one-kept": (Budget(16, 1, 0, 64, 16), [900], 5, 16, None),
    "k-beyond-n": (Budget(4000, 16, 5, 16, 16), [63, 500], 1, 16, None),
    "heads": (HEADS, [700, 400], 3, 16, None),
    "heads-ties": (HEADS, [700], 3, 16, 2),
    "pages-of-32": (Budget(96, 33, 40, 32, 32), [1500, 31], 2, 32, None),
}


@pytest.fixture
def walks(monkeypatch):
    """How often a walk selected."""
    calls = []
    inner = expiry.select_by_expiry

    def counted(*arguments):
        calls.append(arguments)
        inner(*arguments)

    monkeypatch.setattr(expiry, "select_by_expiry", counted)
    return calls


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_walk_selects_what_every_item_selects_by_itself(case, walks, device, monkeypatch):
    budget, lengths, heads, page, levels = case
    paged = build(lengths, heads, 8, page, levels=levels).to(device)
    pairs = [(r, p) for r, n in enumerate(lengths) for p in range(0, n, 13)]
    row, position = items_of([*pairs[::-1], (-1, 0), pairs[0]])
    # the largest of a page is exact; sums of exponentials may tie in one order of additions alone
    units, _ = run(paged, row, position, budget, pooling="max")
    assert len(walks) == 1
    monkeypatch.setattr(expiry, "MAX_UNITS", 0)
    alone, _ = run(paged, row, position, budget, pooling="max")
    assert len(walks) == 1
    assert torch.equal(units, alone)
    expected, _ = reference.select(
        paged.scores.cpu(), paged.block_table.cpu(), row, position, budget, "max",
        max_units=units.shape[2],
    )  # fmt: skip
    assert torch.equal(units, expected)


def test_shares_of_the_context_long_rows_and_few_items_are_selected_item_by_item():
    budget = Budget(48, 20, 3, 16, 16)
    assert expiry.pays(budget, items=8, rows=2, units=expiry.MAX_UNITS)
    assert not expiry.pays(budget, items=7, rows=2, units=64)
    assert not expiry.pays(budget, items=8, rows=2, units=expiry.MAX_UNITS + 1)
    assert not expiry.pays(Budget(48, 20, 3, 16, 16, k_share=0.1), 8, 2, 64)
    by_head = budget.with_heads([(48, None), (16, 0.2)])
    assert not expiry.pays(by_head, 8, 2, 64)


def test_scores_behind_the_end_of_a_row_outdo_nobody(walks, device):
    """Rows end where they end, and what was never pooled is whatever memory held."""
    paged = build([400, 90], 2, 8, 16).to(device)
    row, position = items_of([(r, p) for r, n in ((0, 400), (1, 90)) for p in range(0, n, 16)])
    budget = Budget(32, 20, 3, 16, 16)
    expected, _ = run(paged, row, position, budget, pooling="max")
    for value in (float("inf"), float("nan")):
        pooled, *rest = walks[0]
        ends = {0: budget.end_unit(budget.selection_position(399)), 1: budget.end_unit(80)}
        poisoned = pooled.clone()
        for r, end in ends.items():
            poisoned[r, :, end:] = value
        poisoned[:, :, : budget.first_unit()] = value
        out = torch.full_like(rest[-1], 77)
        expiry.select_by_expiry(poisoned, *rest[:-1], out)
        assert torch.equal(out.cpu(), expected)
