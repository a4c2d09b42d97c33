"""The budget's integer rules, in Python and on the device."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreting

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.reference import visible_positions

with interpreting():
    import triton
    import triton.language as tl

    from vllm_sparsek.kernels.common.device import (
        BUDGET_SCALARS,
        budget_arguments,
        end_unit,
        list_bounds,
        of_head,
        units_kept,
    )

    @triton.jit(do_not_specialize=[*BUDGET_SCALARS, "n", "max_units"])
    def rules_kernel(
        positions_ptr,  # [n] int32
        kept_ptr,  # [heads, n] int32, as the next two
        end_ptr,
        total_ptr,
        n,
        max_units,
        first_unit,
        window,
        refresh,
        k,
        share_bits,
        UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        m = o < n
        position = tl.load(positions_ptr + o, mask=m, other=0)
        start = position // refresh * refresh
        i_h = tl.program_id(1)
        k, share_bits = of_head(k, i_h), of_head(share_bits, i_h)
        o += i_h * n
        tl.store(kept_ptr + o, units_kept(start, k, share_bits, UNIT), mask=m)
        tl.store(end_ptr + o, end_unit(start, first_unit, window, UNIT), mask=m)
        _, _, _, total = list_bounds(
            position, position, first_unit, window, refresh, k, share_bits, max_units, UNIT
        )
        tl.store(total_ptr + o, total, mask=m)


BUDGETS = {
    "token": Budget(k=64, window=16, sinks=4, refresh=1),
    "page": Budget(k=100, window=50, sinks=5, refresh=64, unit=16),
    "share-0.1": Budget(k=10, window=1, sinks=0, refresh=1, k_share=0.1),
    "share-0.07": Budget(k=0, window=16, sinks=3, refresh=1, k_share=0.07),
    "share-third": Budget(k=64, window=16, sinks=3, refresh=16, k_share=1 / 3),
    "share-page": Budget(k=64, window=16, sinks=3, refresh=64, unit=32, k_share=0.55),
}


BY_HEAD = {
    "token": BUDGETS["token"].with_heads([(64, None), (16, None), (400, None)]),
    "share": BUDGETS["share-third"].with_heads([(16, 0.07), (64, 1 / 3), (16, 0.1), (32, 1.0)]),
    "page": BUDGETS["share-page"].with_heads([(64, 0.55), (32, 0.3)]),
}


@pytest.mark.parametrize(
    "budget",
    [*BUDGETS.values(), *BY_HEAD.values()],
    ids=[*BUDGETS, *(f"heads-{n}" for n in BY_HEAD)],
)
def test_device_rules_agree_with_the_budget_up_to_a_million_tokens(budget, device):
    generator = torch.Generator().manual_seed(1)
    # multiples of 100 are where ceil(share * n) is decided by the last bit
    positions = torch.cat(
        [
            torch.arange(700),
            torch.arange(99, 1 << 20, 100 * 97),
            torch.randint(1 << 20, (1000,), generator=generator),
        ]
    ).int()
    n, block = positions.numel(), 1024
    heads = max(1, len(budget.heads))
    found = [torch.full((heads, n), -7, dtype=torch.int32, device=device) for _ in range(3)]
    rules_kernel[(triton.cdiv(n, block), heads)](
        positions.to(device), *found, n, 1 << 30, *budget_arguments(budget, device),
        UNIT=budget.unit, BLOCK=block,
    )  # fmt: skip
    starts = [budget.selection_position(p) for p in positions.tolist()]
    bound = budget.max_tokens_attended(1 << 20)
    for head in range(heads):
        own = budget.of_heads(slice(head, head + 1))
        assert not own.heads
        assert found[0][head].tolist() == [own.units_kept(s) for s in starts]
        assert found[1][head].tolist() == [own.end_unit(s) for s in starts]
        totals = [own.tokens_attended(p) for p in positions.tolist()]
        assert found[2][head].tolist() == totals
        assert max(totals) <= bound


@pytest.mark.parametrize("budget", BY_HEAD.values(), ids=BY_HEAD.keys())
def test_a_budget_of_heads_speaks_of_the_head_that_keeps_most(budget):
    alone = [budget.of_heads(slice(h, h + 1)) for h in range(len(budget.heads))]
    assert [(b.k, b.k_share) for b in alone] == list(budget.heads)
    for position in [0, 70, 111, 999, 5000]:
        assert budget.units_kept(position) == max(b.units_kept(position) for b in alone)
        assert budget.is_dense(position) == any(b.is_dense(position) for b in alone)


def test_heads_that_keep_equally_much_are_no_budget_of_heads():
    plain = BUDGETS["share-page"]
    assert plain.with_heads([(64, 0.55)] * 4) == plain
    some = plain.with_heads([(32, 0.1), (64, 0.55), (64, 0.55)])
    assert some.heads
    assert some.of_heads(slice(1, 3)) == plain
    assert some.of_heads(slice(0, 2)).heads == some.heads[:2]
    assert plain.of_heads(slice(0, 2)) == plain


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_lists_are_as_long_as_the_budget_says(budget):
    for position in [0, 1, 15, 16, 62, 63, 110, 257, 999]:
        start = budget.selection_position(position)
        first, end = budget.first_unit(), budget.end_unit(start)
        kept = torch.arange(first, first + min(budget.units_kept(start), end - first))
        visible = visible_positions(position, kept, budget)
        assert visible.unique().numel() == visible.numel() == budget.tokens_attended(position)
        assert visible.max() == position
        if budget.is_dense(position):
            assert visible.numel() == position + 1
        assert position in visible


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_first_sparse_position_is_where_density_ends(budget):
    first = budget.first_sparse_position(3000)
    assert all(budget.is_dense(p) for p in range(first))
    assert not any(budget.is_dense(p) for p in range(first, 3000))
