"""A selection stands until its position, its blocks or the steps say otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import build, chosen, items_of, kept_lists

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import api
from vllm_sparsek.kernels.select import triton as kernels
from vllm_sparsek.kernels.select.memo import SelectionMemo

BUDGET = Budget(k=24, window=16, sinks=3, refresh=16)
LENGTHS = [200, 131]
MARK = 77


class Steps:
    """One layer's lists over several steps; ``marked`` tells which items were left alone."""

    def __init__(self, device, soft=False, budget=BUDGET):
        self.paged = build(LENGTHS, 2, 8, 16).to(device)
        self.row, self.position = items_of([(r, n - 1) for r, n in enumerate(LENGTHS)])
        self.budget = budget
        shape = (2, 2, budget.max_units(max(LENGTHS)))
        self.units = torch.zeros(shape, dtype=torch.int32, device=device)
        self.gates = torch.zeros(shape, device=device) if soft else None
        stamps = torch.full((2, 2, 4), -2, dtype=torch.int32, device=device)
        self.memo = SelectionMemo(stamps, torch.zeros(1, dtype=torch.int32, device=device))
        self.device = device

    def run(self, step, mark=True):
        if mark:
            self.units.fill_(MARK)
        self.memo.step.fill_(step)
        api.select(
            self.paged.scores, self.paged.block_table, self.row.to(self.device),
            self.position.to(self.device), self.budget, "lse", self.gates is not None, self.units,
            self.gates, impl="triton", memo=self.memo,
        )  # fmt: skip
        return self.units.cpu()

    def marked(self, step):
        return (self.run(step) == MARK).flatten(1).all(1).tolist()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft_v"])
def test_the_first_step_selects_and_the_next_leaves_the_list_alone(device, soft):
    steps = Steps(device, soft)
    host = Steps(torch.device("cpu"), soft)
    expected, _ = chosen(host.paged, host.row, host.position, BUDGET, soft)
    assert torch.equal(steps.run(5), expected)
    assert steps.marked(6) == [True, True]
    assert steps.marked(7) == [True, True]


def test_a_new_refresh_block_selects_anew_for_its_item_alone(device):
    steps = Steps(device)
    steps.run(1)
    steps.position[0] += 16
    assert steps.marked(2) == [False, True]


@pytest.mark.parametrize(
    "budget",
    [
        BUDGET,
        Budget(k=24, window=16, sinks=3, refresh=1),
        Budget(k=90, window=7, sinks=0, refresh=16),
        Budget(k=48, window=16, sinks=3, refresh=16, unit=16),
        Budget(k=8, window=16, sinks=3, refresh=16, k_share=0.25),
        BUDGET.with_heads([(7, None), (60, None)]),
        BUDGET.with_heads([(48, 0.01), (8, 0.3)]),
    ],
    ids=[
        "tokens",
        "every position",
        "list not full at first",
        "pages",
        "list that grows",
        "heads",
        "the list of one head grows",
    ],
)
def test_every_list_is_the_one_a_selection_without_memory_makes(device, budget):
    steps = Steps(device, budget=budget)
    host = Steps(torch.device("cpu"), budget=budget)
    for step, length in enumerate(range(60, LENGTHS[1])):
        steps.position[:] = torch.tensor([length + 69, length])
        expected, _ = chosen(host.paged, steps.row, steps.position, budget, False)
        units = steps.run(step, mark=False)
        assert torch.equal(units[..., : expected.shape[2]], expected), length
        assert bool((units[..., expected.shape[2] :] == -1).all()), length


@pytest.mark.parametrize("budget, merges", [(BUDGET, True), (replace(BUDGET, k_share=0.3), False)])
def test_a_refresh_looks_at_the_list_and_what_left_the_window_alone(device, budget, merges):
    steps = Steps(device, budget=budget)
    steps.position[:] = 111
    kept = set(steps.run(1)[0, 0].tolist())
    passed_over = min(set(range(budget.sinks, 96 - 16 + 1)) - kept)
    block = steps.paged.block_table[0, passed_over // 16]
    # scores never change; one that does tells whether it was read
    steps.paged.scores[block, 0, passed_over % 16] = 1e9
    steps.position[:] = 112
    assert (passed_over in steps.run(2, mark=False)[0, 0].tolist()) is not merges


@pytest.mark.parametrize("most", [0, 1 << 14], ids=["sifted", "pooled"])
def test_pages_that_fit_no_tile_are_sifted_or_pooled_for_a_list_that_is_kept(
    most, device, monkeypatch
):
    monkeypatch.setattr(kernels, "PAGE_FOLD_BLOCK", 4)
    monkeypatch.setattr(kernels, "MOST_POOLED", most)
    budget = Budget(k=32, window=16, sinks=3, refresh=16, unit=16)
    steps, host = Steps(device, budget=budget), Steps(torch.device("cpu"), budget=budget)
    for step, length in enumerate([199, 199, 200, 207]):
        steps.position[:] = torch.tensor([length, 130])
        expected, _ = chosen(host.paged, steps.row, steps.position, budget, False)
        assert torch.equal(steps.run(step, mark=False), expected)


@pytest.mark.parametrize(
    "page, unit, pooling, high",
    [
        (16, 1, "lse", 0.0),
        (16, 1, "lse", 9.0),
        (16, 16, "max", 0.0),
        (16, 16, "lse", 0.0),
        (16, 16, "lse", 9.0),
        (16, 16, "mean", 0.0),
        (32, 32, "max", 0.0),
        (32, 32, "lse", 0.0),
    ],
)
def test_lists_of_long_contexts_are_made_with_the_tiles_of_a_server(
    page, unit, pooling, high, device
):
    for got, expected in kept_lists(page, unit, pooling, high, device):
        assert torch.equal(got, expected)


def test_gates_are_made_anew_at_every_refresh(device):
    steps = Steps(device, soft=True)
    host = Steps(torch.device("cpu"), soft=True)
    for step, length in enumerate(range(150, 190, 8)):
        steps.position[0] = length
        units, gates = chosen(host.paged, steps.row, steps.position, BUDGET, True)
        assert torch.equal(steps.run(step, mark=False), units)
        torch.testing.assert_close(steps.gates.cpu(), gates, rtol=0, atol=1e-5)


def test_other_positions_of_the_same_refresh_block_keep_the_list(device):
    steps = Steps(device)
    steps.position[0] = 193
    steps.run(1)
    steps.position[0] = 207
    assert steps.marked(2) == [True, True]


def test_a_step_that_was_missed_selects_anew(device):
    steps = Steps(device)
    steps.run(1)
    assert steps.marked(3) == [False, False]


def test_the_same_step_again_selects_anew(device):
    # a graph is run more than once on the same metadata while it is captured
    steps = Steps(device)
    steps.run(1)
    assert steps.marked(1) == [False, False]


@pytest.mark.parametrize("block", [0, -1], ids=["first block", "last competing block"])
def test_other_blocks_select_anew(device, block):
    steps = Steps(device)
    steps.run(1)
    end = BUDGET.end_unit(BUDGET.selection_position(LENGTHS[0] - 1))
    column = 0 if block == 0 else (end - 1) // 16
    steps.paged.block_table[0, column] = steps.paged.block_table[1, column]
    assert steps.marked(2) == [False, True]


def test_padding_is_skipped_and_its_list_is_not_taken_up_again(device):
    steps = Steps(device)
    steps.run(1)
    steps.row[1] = -1
    assert steps.marked(2) == [True, True]
    steps.row[1] = 1
    assert steps.marked(3) == [True, False]


def test_a_memo_is_refused_by_other_implementations(device):
    steps = Steps(torch.device("cpu"))
    with pytest.raises(ValueError, match="memo"):
        api.select(
            steps.paged.scores, steps.paged.block_table, steps.row, steps.position, BUDGET, "lse",
            False, steps.units, impl="cpu", memo=steps.memo,
        )  # fmt: skip
