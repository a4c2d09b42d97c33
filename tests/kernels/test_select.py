"""Select: the kernel keeps what the reference keeps, and selections have SparseK's properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import NAN, build, chosen, items_of, paged_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import api, reference
from vllm_sparsek.kernels.select import triton as kernels

PAGE_TOLERANCE = 1e-5  # of a pooled score: sums of exponentials in another order
GATE_TOLERANCE = 1e-5


def run(paged, row, position, budget, soft=False, pooling="lse", impl="triton", extra=3, k=None):
    """Selection of one implementation in poisoned outputs that are ``extra`` too wide."""
    device = paged.scores.device
    if k is None:
        longest = budget.selection_position(max(position.max().item(), 0))
        k = budget.units_kept(longest) + extra
    shape = (row.numel(), paged.scores.shape[1], k)
    units = torch.full(shape, 77, dtype=torch.int32, device=device)
    gates = torch.full(shape, NAN, device=device) if soft else None
    api.select(
        paged.scores, paged.block_table, row.to(device), position.to(device), budget, pooling,
        soft, units, gates, impl=impl,
    )  # fmt: skip
    return units.cpu(), None if gates is None else gates.cpu()


BY_HEAD = Budget(1, 16, 5, 16).with_heads([(40, None), (3, None), (300, None)])
BY_HEAD_SHARE = Budget(1, 16, 5, 16).with_heads([(16, 0.3), (32, 0.07)])
TOKEN_CASES = {
    "short-contexts": (Budget(32, 16, 5, 1), [1, 63, 111], 2, 16, None),
    "thousand": (Budget(100, 33, 4, 1), [1000, 999], 1, 32, None),
    "several-steps": (Budget(300, 10, 0, 16), [5000], 1, 128, None),
    "refresh-64": (Budget(20, 1, 3, 64), [63, 64, 65, 300], 2, 16, None),
    "window-1-k-1": (Budget(1, 1, 0, 1), [1, 2, 3, 111], 2, 16, None),
    "ties": (Budget(25, 8, 2, 1), [111, 300], 3, 16, 3),
    "all-equal": (Budget(25, 8, 2, 1), [300], 1, 16, 1),
    "k-share": (Budget(8, 16, 5, 16, k_share=0.1), [1, 63, 500, 1000], 2, 32, None),
    "k-beyond-n": (Budget(4000, 16, 5, 1), [63, 1000], 1, 16, None),
    "heads": (BY_HEAD, [1, 63, 111, 1000], 3, 16, None),
    "heads-ties": (BY_HEAD, [300], 3, 32, 3),
    "heads-share": (BY_HEAD_SHARE, [63, 500, 1000], 2, 16, None),
    "nothing-competes": (Budget(8, 16, 200, 1), [63, 111], 2, 16, None),
}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft_v"])
@pytest.mark.parametrize("case", TOKEN_CASES.values(), ids=TOKEN_CASES.keys())
def test_token_selection_is_the_references_to_the_last_tie(case, soft, device):
    budget, lengths, heads, page, levels = case
    paged = build(lengths, heads, 8, page, levels=levels)
    pairs = [(row, n - 1) for row, n in enumerate(lengths)] + [(-1, 0), (0, lengths[0] // 2)]
    row, position = items_of(pairs)
    expected, expected_gates = chosen(paged, row, position, budget, soft)
    units, gates = run(paged.to(device), row, position, budget, soft)
    k = expected.shape[2]
    assert torch.equal(units[..., :k], expected)
    assert (units[..., k:] == -1).all()
    if soft:
        torch.testing.assert_close(gates[..., :k], expected_gates, rtol=0, atol=GATE_TOLERANCE)
        assert (gates[..., k:] == 0).all()


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize(
    ("budget", "soft"),
    [
        (BY_HEAD, False),
        (replace(BY_HEAD, unit=16), True),
        (Budget(1, 16, 5, 16).with_heads([(16, 0.3), (32, 0.07), (1, 0.3)]), True),
    ],
    ids=["tokens", "pages-soft", "share-soft"],
)
def test_every_head_keeps_what_it_would_keep_alone(budget, soft, impl, device):
    if impl != "triton" and device.type == "cuda":
        pytest.skip("runs on the CPU")
    paged = build([500, 130], 3, 8, 16)
    row, position = items_of([(0, 499), (1, 129), (-1, 0), (0, 200)])
    there = paged.to(device)
    units, gates = run(there, row, position, budget, soft, "max", impl)
    scores, counts = there.scores, set()
    for head, (k, k_share) in enumerate(budget.heads):
        own = replace(budget, k=k, k_share=k_share, heads=())
        there.scores = scores[:, head : head + 1]
        width = units.shape[2]
        alone, gate = run(there, row, position, own, soft, "max", impl, k=width)
        counts.add(int((alone[0] >= 0).sum()))
        assert torch.equal(units[:, head : head + 1], alone)
        if soft:
            torch.testing.assert_close(gates[:, head : head + 1], gate, rtol=0, atol=1e-6)
    assert len(counts) > 1


@pytest.mark.parametrize("pooling", ["lse", "max", "mean"])
@pytest.mark.parametrize(
    ("page", "refresh", "sinks", "lengths"),
    [
        (16, 1, 5, [1, 63, 111, 1000]),
        (32, 64, 0, [111, 700]),
        (48, 16, 49, [500]),
        (128, 16, 1, [127, 1000, 2500]),
    ],
    ids=["page16", "page32", "page48", "page128"],
)
def test_page_selection_differs_from_the_references_only_in_rounding(
    pooling, page, refresh, sinks, lengths, device
):
    budget = Budget(k=6 * page - 3, window=33, sinks=sinks, refresh=refresh, unit=page)
    paged = build(lengths, 2, 8, page)
    row, position = items_of([(row, n - 1) for row, n in enumerate(lengths)] + [(-1, 5)])
    expected, expected_gates = reference.select(
        paged.scores, paged.block_table, row, position, budget, pooling, True
    )
    units, gates = run(paged.to(device), row, position, budget, True, pooling)
    k = expected.shape[2]
    assert (units[..., k:] == -1).all()
    units, gates = units[..., :k], gates[..., :k]
    if pooling == "max":
        assert torch.equal(units, expected)
    assert torch.equal((units >= 0).sum(-1), (expected >= 0).sum(-1))
    for item, head in torch.cartesian_prod(torch.arange(row.numel()), torch.arange(2)).tolist():
        got, want = units[item, head], expected[item, head]
        got, want = set(got[got >= 0].tolist()), set(want[want >= 0].tolist())
        assert sorted(got) == units[item, head][: len(got)].tolist()
        n = lengths[row[item]] // page * page
        z = reference.unit_scores(paged.token_scores[row[item]][:n].T, page, pooling)[head]
        if got != want:
            near = [(z[a] - z[b]).abs() for a in got - want for b in want - got]
            assert max(near) < PAGE_TOLERANCE
    torch.testing.assert_close(gates, expected_gates, rtol=0, atol=10 * PAGE_TOLERANCE)


def test_minus_infinity_loses_to_everything_and_ties_with_itself(device):
    paged = build([111], 1, 8, 16)
    paged.scores[paged.block_table[0, :5].long()] = float("-inf")
    for unit in (1, 16):
        budget = Budget(k=48, window=5, sinks=3, refresh=1, unit=unit)
        row, position = items_of([(0, 110)])
        expected, _ = chosen(paged, row, position, budget)
        units, _ = run(paged.to(device), row, position, budget, extra=0)
        assert torch.equal(units, expected)


def test_zero_and_minus_zero_are_equal(device):
    paged = build([64], 1, 8, 16, levels=1)
    paged.scores[paged.block_table[0, :3].long()] = -0.0
    budget = Budget(k=20, window=5, sinks=0, refresh=1)
    row, position = items_of([(0, 63)])
    units, _ = run(paged.to(device), row, position, budget, extra=0)
    assert units[0, 0].tolist() == list(range(20))


def test_extreme_scores_keep_their_order(device):
    paged = build([64], 1, 8, 16)
    values = torch.tensor([-3.4e38, 3.4e38, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, 0.9999999] * 8)
    at = torch.arange(64)
    paged.scores[paged.block_table[0, at // 16].long(), 0, at % 16] = values
    for k in (1, 8, 9, 16, 20, 31, 33, 50):
        budget = Budget(k=k, window=1, sinks=0, refresh=1)
        row, position = items_of([(0, 63)])
        expected, _ = chosen(paged, row, position, budget)
        units, _ = run(paged.to(device), row, position, budget, extra=0)
        assert torch.equal(units, expected), k


def test_a_row_of_the_table_may_be_read_by_many_items_and_in_any_order(device):
    paged = build([300, 200], 2, 8, 16)
    row, position = items_of([(1, 150), (0, 250), (1, 199), (0, 250), (-1, 7), (0, 40)])
    budget = Budget(k=30, window=16, sinks=4, refresh=16)
    expected, _ = chosen(paged, row, position, budget)
    for impl in ("triton",) if device.type == "cuda" else ("triton", "cpu", "reference"):
        units, _ = run(paged.to(device), row, position, budget, extra=0, impl=impl)
        assert torch.equal(units, expected), impl


@st.composite
def selections(draw):
    """A request with many ties and a budget around its size."""
    n = draw(st.integers(1, 90))
    unit = draw(st.sampled_from([1, 1, 16]))
    budget = Budget(
        k=draw(st.integers(1, 60)),
        window=draw(st.integers(1, 30)),
        sinks=draw(st.integers(0, 20)),
        refresh=draw(st.sampled_from([1, 1, 16, 64])),
        unit=unit,
        k_share=draw(st.sampled_from([None, None, 0.1, 0.3])),
    )
    paged = build([n], 1, 8, 16, seed=draw(st.integers(0, 99)), levels=draw(st.integers(1, 8)))
    return paged, n, budget


def outside_window(n: int, budget: Budget, position: int) -> range:
    """Units that compete for the selection of ``position``."""
    start = budget.selection_position(position)
    return range(budget.first_unit(), budget.end_unit(start))


@settings(max_examples=60, deadline=None)
@given(selections())
def test_what_is_kept_scores_at_least_as_high_as_what_is_not(case):
    paged, n, budget = case
    row, position = items_of([(0, n - 1)])
    units, _ = chosen(paged, row, position, budget)
    kept = [u for u in units[0, 0].tolist() if u >= 0]
    rest = [u for u in outside_window(n, budget, n - 1) if u not in kept]
    z = reference.unit_scores(paged.token_scores[0].T, budget.unit, "lse")[0].tolist()
    assert kept == sorted(set(kept))
    start = budget.selection_position(n - 1)
    assert len(kept) == min(budget.units_kept(start), len(kept) + len(rest))
    for lost in rest:
        for won in kept:
            # of equals the earlier stays
            assert z[won] > z[lost] or (z[won] == z[lost] and won < lost)


@settings(max_examples=40, deadline=None)
@given(selections())
def test_a_token_that_fell_out_never_returns(case):
    paged, n, budget = case
    budget = Budget(budget.k, budget.window, budget.sinks, 1)
    row, position = items_of([(0, p) for p in range(n)])
    units, _ = chosen(paged, row, position, budget)
    lost: set[int] = set()
    for p in range(n):
        kept = set(units[p, 0].tolist())
        assert not kept & lost
        lost |= set(outside_window(n, budget, p)) - kept


@settings(max_examples=40, deadline=None)
@given(selections())
def test_everything_is_kept_while_it_fits(case):
    paged, n, budget = case
    row, position = items_of([(0, n - 1)])
    competing = outside_window(n, budget, n - 1)
    units, gates = chosen(paged, row, position, budget, soft=True)
    if len(competing) <= budget.units_kept(budget.selection_position(n - 1)):
        assert units[0, 0][: len(competing)].tolist() == list(competing)
        assert (gates[0, 0][: len(competing)] == 1).all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(selections(), st.booleans())
def test_the_kernel_agrees_with_the_reference_on_any_request(case, soft):
    from interpreter import DEVICE

    paged, n, budget = case
    if budget.unit > 1:
        soft = False
    row, position = items_of([(0, n - 1), (-1, 0), (0, n // 2)])
    pooling = "max" if budget.unit > 1 else "lse"
    expected, expected_gates = reference.select(
        paged.scores, paged.block_table, row, position, budget, pooling, soft
    )
    units, gates = run(paged.to(DEVICE), row, position, budget, soft, pooling, extra=0)
    assert torch.equal(units, expected)
    if soft:
        torch.testing.assert_close(gates, expected_gates, rtol=0, atol=GATE_TOLERANCE)


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 30.0])
def test_gates_are_the_references_for_flat_steep_and_clustered_scores(scale, device):
    lengths = [63, 300]
    paged = build(lengths, 2, 8, 16)
    paged.scores *= scale
    # clusters a little more and a little less than 1 apart make Newton's method jump
    paged.scores[:, 1] = (paged.scores[:, 1] / scale).round() * 0.999 + paged.scores[:, 1] * 1e-3
    row, position = items_of([(r, n - 1) for r, n in enumerate(lengths)])
    for k in (1, 7, 64):
        budget = Budget(k=k, window=5, sinks=1, refresh=1)
        expected, expected_gates = chosen(paged, row, position, budget, True)
        units, gates = run(paged.to(device), row, position, budget, True, extra=0)
        assert torch.equal(units, expected)
        torch.testing.assert_close(gates, expected_gates, rtol=0, atol=GATE_TOLERANCE)


def test_soft_gates_are_one_where_scores_of_minus_infinity_find_room(device):
    paged = build([111], 1, 8, 16)
    paged.scores[paged.block_table[0, :5].long()] = float("-inf")
    budget = Budget(k=60, window=5, sinks=0, refresh=1)
    row, position = items_of([(0, 110)])
    for impl in ("triton",) if device.type == "cuda" else ("triton", "cpu", "reference"):
        units, gates = run(paged.to(device), row, position, budget, True, extra=0, impl=impl)
        assert (units < 80).sum() == 60 - 26
        assert (gates == 1).all()


# of 1,000 units, 977 of which compete; a sample looks at 8 neighbours of every 122 or so
SIFTED = {
    "random": torch.randn,
    "rising": lambda n: torch.arange(n) * 1.0,
    "falling": lambda n: -torch.arange(n) * 1.0,
    "equal": torch.ones,
    "few levels": lambda n: torch.randint(0, 3, (n,)) * 1.0,
    "sample above": lambda n: torch.randn(n) + 100.0 * (torch.arange(n) % 122 < 8),
    "sample below": lambda n: torch.randn(n) - 100.0 * (torch.arange(n) % 122 < 8),
    "some of the sample above": lambda n: torch.randn(n) + 9.0 * (torch.arange(n) % 122 < 3),
    "clusters": lambda n: torch.randn(n) + 9.0 * (torch.arange(n) // 37 % 9 == 1),
    "no scores": lambda n: torch.full((n,), float("-inf")),
}


@pytest.mark.parametrize(
    ("unit", "page"),
    [(1, 16), (1, 64), (1, 8), (1, None), (16, 16), (16, None)],
    ids=["tokens", "tokens-page64", "tokens-page8", "tokens-one-block", "pages", "pages-one-block"],
)
@pytest.mark.parametrize("scores", SIFTED.values(), ids=SIFTED.keys())
def test_long_contexts_are_sifted_to_the_references_selection(
    scores, unit, page, device, monkeypatch
):
    monkeypatch.setattr(kernels, "TOKEN_BLOCK", 64)
    monkeypatch.setattr(kernels, "PAGE_FOLD_BLOCK", 4)
    n = 1000 * unit
    size = page or n
    paged = build([n], 1, 8, size)
    if page is None:
        paged.block_table = paged.block_table[:, :1]
    sinks = 3 * unit
    of_unit = torch.cat([torch.zeros(3), scores(997)]).repeat_interleave(unit)
    pages = torch.nn.functional.pad(of_unit, (0, -n % size), value=NAN).view(-1, size)
    paged.scores[paged.block_table[0, : len(pages)].long(), 0] = pages
    positions = [(0, n - 1), (0, n // 2), (-1, 0), (0, n - 22 * unit)]
    row, position = items_of(positions)
    for k in (1, 30):
        budget = Budget(k=k * unit, window=20, sinks=sinks, refresh=1, unit=unit)
        expected, _ = reference.select(
            paged.scores, paged.block_table, row, position, budget, "max"
        )
        units, _ = run(paged.to(device), row, position, budget, pooling="max", extra=0)
        assert torch.equal(units, expected)


@pytest.mark.parametrize("kept", ["pooled", "too many to be kept"])
@pytest.mark.parametrize("programs", [1, 8192], ids=["in a loop", "side by side"])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(k=48, window=20, sinks=17, refresh=16, unit=16),
        Budget(k=48, window=20, sinks=0, refresh=1, unit=16).with_heads(
            [(16, None), (64, None), (100, None)]
        ),
        Budget(k=16, window=5, sinks=3, refresh=64, unit=16, k_share=0.3),
        Budget(k=9999, window=20, sinks=0, refresh=16, unit=16),
        Budget(k=48, window=20, sinks=400, refresh=16, unit=16),
    ],
    ids=["refresh-16", "heads", "share", "k beyond n", "nothing competes"],
)
def test_pages_are_pooled_once_for_items_in_any_order(budget, programs, kept, device, monkeypatch):
    monkeypatch.setattr(kernels, "POOL_PAIRS", 16)
    monkeypatch.setattr(kernels, "POOL_PROGRAMS", programs)
    if kept != "pooled":
        monkeypatch.setattr(kernels, "POOLED_BYTES", 0)
    paged = build([300, 201, 17], 3, 8, 16, levels=7)
    of_row_0 = [(0, position) for position in (*range(40, 300, 37), 299)]
    pairs = [*of_row_0, (1, 199), (1, 150), (-1, 7), (1, 200), (0, 299), (2, 16), (0, 40), (1, 3)]
    row, position = items_of(pairs)
    expected, _ = reference.select(
        paged.scores, paged.block_table, row, position, budget, "max", False
    )
    launched = []
    pool = kernels._pooled
    monkeypatch.setattr(kernels, "_pooled", lambda *a: launched.append(pool(*a)) or launched[-1])

    def poisoned(shape, dtype, device):
        return torch.full(shape, 77 if dtype == torch.int32 else NAN, dtype=dtype, device=device)

    there = paged.to(device)
    monkeypatch.setattr(kernels.torch, "empty", poisoned)
    units, _ = run(there, row, position, budget, pooling="max", extra=0)
    monkeypatch.undo()
    assert torch.equal(units, expected)
    assert [found is not None for found in launched] == [kept == "pooled"]


@pytest.mark.parametrize("pooling", ["lse", "max", "mean"])
@pytest.mark.parametrize("page", [16, 48, 128])
def test_pages_pooled_before_are_those_that_a_program_pools_itself(
    page, pooling, device, monkeypatch
):
    lengths = [1500, 900]
    paged = build(lengths, 2, 8, page).to(device)
    budget = Budget(k=3 * page, window=20, sinks=3, refresh=1, unit=page)
    row, position = items_of([(r, p) for r, n in enumerate(lengths) for p in range(99, n, 100)])
    units, _ = run(paged, row, position, budget, pooling=pooling)
    monkeypatch.setattr(kernels, "POOLED_BYTES", 0)
    alone, _ = run(paged, row, position, budget, pooling=pooling)
    assert torch.equal(units, alone)


@pytest.mark.parametrize("columns", [1, None], ids=["one block a row", "pages"])
def test_pages_of_heads_that_fill_no_tile_are_pooled(columns, device):
    heads, n = 5, 163
    scores = torch.randn(2, heads, n)
    scores = torch.nn.functional.pad(scores, (0, -n % 16), value=NAN)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    if columns is None:
        scores = scores.unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1)
        table = torch.arange(scores.shape[0], dtype=torch.int32).view(2, -1).flip(0)
    budget = Budget(k=48, window=20, sinks=5, refresh=16, unit=16)
    row, position = items_of([(r, p) for r in (0, 1) for p in range(0, n, 16)])
    width = budget.max_units(n)
    there = [x.to(device) for x in (scores, table, row, position)]
    units = torch.empty(row.numel(), heads, width, dtype=torch.int32, device=device)
    api.select(*there, budget, "max", False, units, impl="triton")
    expected, _ = reference.select(scores, table, row, position, budget, "max", max_units=width)
    assert torch.equal(units.cpu(), expected)


@pytest.mark.gpu
def test_scores_of_blocks_beyond_two_to_the_31_are_found(device):
    heads, page, n = 2, 16, 300
    far = build([n], heads, 8, page)
    used = far.scores.shape[0]
    stride = (1 << 31) // (used - 2) // 64 * 64
    storage = torch.empty(stride * used, device=device)
    scores = storage.as_strided(far.scores.shape, (stride, page, 1)).copy_(far.scores)
    assert scores.stride(0) * (used - 1) > 1 << 31
    budget = Budget(k=30, window=16, sinks=4, refresh=1)
    row, position = items_of([(0, n - 1)])
    expected, _ = chosen(far, row, position, budget)
    far = far.to(device)
    far.scores = scores
    units, _ = run(far, row, position, budget, extra=0)
    assert torch.equal(units, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_a_million_tokens_are_selected_exactly(unit, device):
    n, page = 1 << 20, 16
    scores = paged_view(n // page + 1, 1, page, 1, torch.float32, device)[..., 0]
    scores.copy_(torch.randn(scores.shape, device=device))
    table = (torch.randperm(n // page, device=device) + 1).int()[None]
    budget = Budget(k=8192, window=512, sinks=4, refresh=128, unit=unit)
    row = torch.zeros(1, dtype=torch.int32, device=device)
    position = torch.full((1,), n - 1, dtype=torch.int32, device=device)
    units = torch.empty(1, 1, budget.max_units(n), dtype=torch.int32, device=device)
    api.select(scores, table, row, position, budget, "max", False, units)
    expected, _ = reference.select(
        scores.cpu(), table.cpu(), row.cpu(), position.cpu(), budget, "max"
    )
    assert torch.equal(units.cpu(), expected)
