"""Items of a chunk that share a base keep exactly what each would keep by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import build, items_of

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import api, reference
from vllm_sparsek.kernels.select import triton as kernels
from vllm_sparsek.kernels.select.chunk import ChunkBases

BUDGET = Budget(k=24, window=16, sinks=3, refresh=16)
# (row, first position, last position) of the items of a base
CHUNKS = [(0, 320, 480), (1, 16, 130)]
LENGTHS = [500, 140]
BUDGETS = {
    "tokens": BUDGET,
    "list as long as the context at first": replace(BUDGET, k=110),
    "every position": replace(BUDGET, refresh=1),
    "list that grows": replace(BUDGET, k=8, k_share=0.25),
    "pages": Budget(k=48, window=20, sinks=17, refresh=16, unit=16),
    "heads": BUDGET.with_heads([(7, None), (110, None)]),
    "the list of one head grows": BUDGET.with_heads([(48, 0.01), (8, 0.3)]),
    "nothing competes": replace(BUDGET, sinks=600),
}


@pytest.fixture(autouse=True)
def _bases_always(monkeypatch):
    """However few units compete."""
    monkeypatch.setattr(kernels, "_base_pays", lambda *_: True)


def chunk_items(budget):
    """item_row, item_position and the bases of CHUNKS."""
    pairs, item_base, bounds = [], [], []
    for base, (row, first, last) in enumerate(CHUNKS):
        later = range(first + budget.refresh, last + 1, max(7, budget.refresh))
        positions = [first + 5 % budget.refresh, *later]
        pairs += [(row, position) for position in positions]
        item_base += [base] * len(positions)
        starts = [budget.selection_position(p) for p in (positions[0], positions[-1])]
        bounds.append([row, *starts])
    row, position = items_of([*pairs, (-1, 0)])
    bases = ChunkBases(
        torch.tensor([*item_base, 0], dtype=torch.int32),
        torch.tensor(bounds, dtype=torch.int32),
        longest=max(bound[1] for bound in bounds),
        span=max(bound[2] - bound[1] for bound in bounds),
    )
    return row, position, bases


def run(paged, row, position, bases, budget, soft=False):
    device = paged.scores.device
    shape = (row.numel(), paged.scores.shape[1], budget.max_units(max(LENGTHS)))
    units = torch.full(shape, 77, dtype=torch.int32, device=device)
    gates = torch.empty(shape, device=device) if soft else None
    bases = replace(bases, item_base=bases.item_base.to(device), bounds=bases.bounds.to(device))
    api.select(
        paged.scores, paged.block_table, row.to(device), position.to(device), budget, "max", soft,
        units, gates, impl="triton", bases=bases,
    )  # fmt: skip
    return units.cpu()


@pytest.mark.parametrize("tile", [4096, 16], ids=["one tile", "sifted"])
@pytest.mark.parametrize("levels", [None, 4], ids=["random", "ties"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_the_selection_is_that_of_every_item_alone(budget, levels, tile, device, monkeypatch):
    monkeypatch.setattr(kernels, "TOKEN_BLOCK", tile)
    monkeypatch.setattr(kernels, "PAGE_FOLD_BLOCK", tile // 16)
    paged = build(LENGTHS, 2, 8, 16, levels=levels)
    row, position, bases = chunk_items(budget)
    width = budget.max_units(max(LENGTHS))
    expected, _ = reference.select(
        paged.scores, paged.block_table, row, position, budget, "max", False, width
    )
    assert torch.equal(run(paged.to(device), row, position, bases, budget), expected)


def test_items_look_at_their_base_and_at_what_left_the_window_since(device):
    paged = build(LENGTHS, 2, 8, 16)
    row, position, bases = chunk_items(BUDGET)
    first_end = BUDGET.end_unit(CHUNKS[0][1])
    kept = set(run(paged.to(device), row, position, bases, BUDGET)[0, 0].tolist())
    passed_over = min(set(range(BUDGET.sinks, first_end)) - kept)
    # an end before this token: it competes for the items, but is not in the base
    bases.bounds[0, 1] = 16 * (passed_over // 16)
    bases = replace(bases, span=500)
    paged.scores[paged.block_table[0, passed_over // 16], 0, passed_over % 16] = 1e9
    units = run(paged.to(device), row, position, bases, BUDGET)
    assert all(passed_over in item.tolist() for item in units[:3, 0])


def test_bases_are_refused_where_they_cannot_serve(device):
    paged = build(LENGTHS, 2, 8, 16)
    row, position, bases = chunk_items(BUDGET)
    with pytest.raises(ValueError, match="bases are for hard selection"):
        run(paged.to(device), row, position, bases, BUDGET, soft=True)
    units = torch.empty(row.numel(), 2, BUDGET.k, dtype=torch.int32)
    with pytest.raises(ValueError, match="memo and bases"):
        api.select(
            paged.scores, paged.block_table, row, position, BUDGET, "max", False, units,
            impl="cpu", bases=bases,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"bases\.item_base"):
        run(paged.to(device), row, position, replace(bases, item_base=bases.item_base[:2]), BUDGET)


def test_bases_are_made_where_they_leave_items_less_to_look_at():
    # (units kept, most units that compete)
    assert kernels.shares_base(256, 3900)
    assert not kernels.shares_base(2100, 3900)
    assert not kernels.shares_base(16, 900)


@pytest.mark.parametrize("pays", [True, False])
def test_a_base_that_does_not_pay_is_not_made(pays, device, monkeypatch):
    monkeypatch.setattr(kernels, "_base_pays", lambda *_: pays)
    made = []
    lists = kernels._base_lists
    monkeypatch.setattr(kernels, "_base_lists", lambda *a: made.append(1) or lists(*a))
    paged = build(LENGTHS, 2, 8, 16)
    row, position, bases = chunk_items(BUDGET)
    width = BUDGET.max_units(max(LENGTHS))
    expected, _ = reference.select(
        paged.scores, paged.block_table, row, position, BUDGET, "max", False, width
    )
    assert torch.equal(run(paged.to(device), row, position, bases, BUDGET), expected)
    assert bool(made) is pays
