"""A selection stands from step to step until its position, its blocks or the steps say otherwise."""

from __future__ import annotations

import pytest
import torch
from caches import build, chosen, items_of

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import api
from vllm_sparsek.kernels.select.memo import SelectionMemo

BUDGET = Budget(k=24, window=16, sinks=3, refresh=16)
LENGTHS = [200, 131]
MARK = 77


class Steps:
    """One layer's lists over several steps; ``marked`` tells which items were left alone."""

    def __init__(self, device, soft=False):
        self.paged = build(LENGTHS, 2, 8, 16).to(device)
        self.row, self.position = items_of([(r, n - 1) for r, n in enumerate(LENGTHS)])
        shape = (2, 2, BUDGET.k)
        self.units = torch.zeros(shape, dtype=torch.int32, device=device)
        self.gates = torch.zeros(shape, device=device) if soft else None
        stamps = torch.full((2, 2, 4), -2, dtype=torch.int32, device=device)
        self.memo = SelectionMemo(stamps, torch.zeros(1, dtype=torch.int32, device=device))
        self.device = device

    def run(self, step):
        self.units.fill_(MARK)
        self.memo.step.fill_(step)
        api.select(
            self.paged.scores, self.paged.block_table, self.row.to(self.device),
            self.position.to(self.device), BUDGET, "lse", self.gates is not None, self.units,
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
