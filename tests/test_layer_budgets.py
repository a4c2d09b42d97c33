"""Budgets per layer and head: how a total is split, and what a scorer's file may ask for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparsek.attention.layer_budgets import capped, read_shares, split, split_budget
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget, mean_tokens_attended
from vllm_sparsek.scorers.scorer_file import (
    ScorerFile,
    ScorerFileError,
    ScorerHeader,
    save_scorer,
)

LONGEST = 100_000


def layers(*shares):
    """One share for all heads of a layer."""
    return tuple((share,) for share in shares)


BUDGET = Budget(k=512, window=64, sinks=4, refresh=16)


def test_equal_shares_are_the_nominal_budget():
    assert set(split_budget(BUDGET, layers(*[1.0] * 30), (), LONGEST)) == {BUDGET}
    assert set(split_budget(BUDGET, ((1.0,) * 4,) * 30, (), LONGEST)) == {BUDGET}
    share = Budget(k=64, window=64, sinks=4, refresh=16, k_share=0.25)
    assert set(split_budget(share, layers(*[1.0] * 30), (), LONGEST)) == {share}
    assert set(split_budget(share, ((1.0,) * 4,) * 30, (), LONGEST)) == {share}


def test_a_layer_with_twice_the_share_keeps_twice_as_much():
    a, b, c = split_budget(BUDGET, layers(0.5, 1.0, 1.5), (), LONGEST)
    assert (a.k, b.k, c.k) == (256, 512, 768)
    # shares are relative to each other
    assert split_budget(BUDGET, layers(5.0, 10.0, 15.0), (), LONGEST) == (a, b, c)


def test_heads_are_given_their_shares_of_all_layers_total():
    shares = ((0.25, 0.75), (1.0, 2.0), (0.0, 0.0), (9.0, 9.0))
    a, b, none, dense = split_budget(BUDGET, shares, (3,), LONGEST)
    assert none is dense is None
    assert a.heads == ((128, None), (384, None))
    assert b.heads == ((512, None), (1024, None))
    assert (a.k, b.k) == (384, 1024)
    # heads of a layer that get equally much are no budget of heads
    a, b = split_budget(BUDGET, ((0.5, 0.5), (1.0, 2.0)), (), LONGEST)
    assert a == replace(BUDGET, k=256)
    assert b.heads == ((512, None), (1024, None))


def test_heads_shares_of_the_context_keep_their_total_and_end_at_the_whole_context():
    budget = Budget(k=64, window=64, sinks=4, refresh=16, k_share=0.5)
    a, b = split_budget(budget, ((0.1, 0.3), (0.6, 9.0)), (), LONGEST)
    # what the last head cannot use goes to the first three
    assert [share for _, share in a.heads + b.heads] == pytest.approx([0.1, 0.3, 0.6, 1.0])
    assert sum(k for k, _ in a.heads + b.heads) == 4 * 64
    assert b.k_share == 1.0


def test_heads_are_split_in_whole_pages():
    budget = Budget(k=100, window=64, sinks=4, refresh=16, unit=32)
    found = split_budget(budget, ((0.3, 1.0), (1.7, 1.0)), (), LONGEST)
    kept = [k for b in found for k, _ in b.heads]
    assert all(k % 32 == 0 for k in kept)
    assert sum(kept) == 4 * budget.units_kept(5000) * 32


def test_dense_layers_and_layers_without_a_share_do_not_count():
    found = split_budget(BUDGET, layers(7.0, 0.5, 0.0, 1.5), (0,), LONGEST)
    assert found[0] is None
    assert found[2] is None
    assert (found[1].k, found[3].k) == (256, 768)


def test_pages_are_split_whole():
    budget = Budget(k=100, window=64, sinks=4, refresh=16, unit=32)
    found = split_budget(budget, layers(0.3, 1.0, 1.7), (), LONGEST)
    assert [b.k % 32 for b in found] == [0, 0, 0]
    assert sum(b.units_kept(5000) for b in found) == 3 * budget.units_kept(5000)


def test_a_share_of_the_context_is_scaled_up_to_the_whole_context():
    budget = Budget(k=64, window=64, sinks=4, refresh=16, k_share=0.3)
    low, high = split_budget(budget, layers(0.25, 2.75), (), LONGEST)
    assert low.k_share == pytest.approx(0.3 * 0.25 / 1.5)
    _, higher = split_budget(budget, layers(0.05, 2.95), (), LONGEST)
    assert higher.k_share == pytest.approx(0.3 * 2.95 / 1.5)
    # what the last layer cannot use goes to the first two
    found = split_budget(replace(budget, k_share=0.5), layers(0.1, 0.3, 9.0), (), LONGEST)
    assert [b.k_share for b in found] == pytest.approx([0.125, 0.375, 1.0])
    assert high.k % 16 == 0
    assert low.k + high.k == 128


def test_no_layer_is_given_more_than_the_longest_context():
    found = split_budget(BUDGET, layers(0.5, 0.5, 2.0), (), 800)
    assert [b.k for b in found] == [368, 368, 800]
    # a budget beyond every context reads everything, whatever the shares
    assert {b.k for b in split_budget(BUDGET, layers(0.5, 0.5, 2.0), (), 300)} == {512}


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=40),
    st.floats(1.0001, 50),
)
def test_capped_shares_keep_their_mean_and_order(shares, ceiling):
    mean = sum(shares) / len(shares)
    relative = [share / mean for share in shares]
    found = capped(relative, ceiling)
    assert sum(found) == pytest.approx(len(shares), rel=1e-6)
    assert max(found) <= ceiling * (1 + 1e-6)
    ordered = sorted(range(len(shares)), key=relative.__getitem__)
    assert all(found[a] <= found[b] + 1e-9 for a, b in itertools.pairwise(ordered))


@given(
    st.integers(1, 5000),
    st.lists(st.floats(0.001, 100), min_size=1, max_size=40),
    st.sampled_from([16, 32, 128]),
)
def test_a_split_has_the_nominal_total_in_positive_multiples(k, shares, step):
    mean = sum(shares) / len(shares)
    relative = [share / mean for share in shares]
    found = split(k, relative, step)
    assert all(places > 0 and places % step == 0 for places in found)
    if k >= step:
        assert abs(sum(found) - len(shares) * k) <= step / 2 + 1e-6
    # a larger share never gets less
    order = sorted(range(len(shares)), key=lambda i: (relative[i], -i))
    assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("k_share", [None, 0.3], ids=["number", "share"])
@pytest.mark.parametrize("unit", [1, 32])
def test_the_mean_over_layers_is_the_mean_of_each_layers_tokens(unit, k_share):
    nominal = Budget(k=96, window=50, sinks=4, refresh=16, unit=unit, k_share=k_share)
    budgets = split_budget(nominal, layers(0.2, 0.5, 1.0, 1.3, 2.0), (), LONGEST)
    first = nominal.first_sparse_position(4000)
    positions = np.arange(first, 3000, dtype=np.int64)
    found = mean_tokens_attended(budgets, positions)
    expected = [np.mean([b.tokens_attended(int(p)) for b in budgets]) for p in positions]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # the layer with the largest budget reads everything at first
    assert budgets[-1].is_dense(first)


@pytest.mark.parametrize("k_share", [None, 0.3], ids=["number", "share"])
def test_the_mean_over_heads_counts_every_layer_once(k_share):
    nominal = Budget(k=96, window=50, sinks=4, refresh=16, k_share=k_share)
    even, uneven = split_budget(nominal, ((0.5, 0.5, 0.5), (0.1, 1.0, 3.4)), (), LONGEST)
    assert not even.heads
    positions = np.arange(nominal.first_sparse_position(4000), 3000, dtype=np.int64)
    alone = [uneven.of_heads(slice(head, head + 1)) for head in range(3)]
    expected = [
        (even.tokens_attended(int(p)) + np.mean([b.tokens_attended(int(p)) for b in alone])) / 2
        for p in positions
    ]
    np.testing.assert_allclose(
        mean_tokens_attended([even, uneven], positions), expected, rtol=1e-12
    )


def test_a_rank_keeps_its_heads_of_the_whole_models_split(monkeypatch):
    from vllm_sparsek.attention import settings
    from vllm_sparsek.attention.impl import SparseKImpl

    shares = ((0.5, 0.5, 1.0, 1.0), (2.0, 1.0, 0.5, 1.5))
    model = SimpleNamespace(max_model_len=LONGEST)
    vllm_config = SimpleNamespace(instance_id="two ranks", model_config=model)
    config = SparseKConfig(k=512, window=64, sinks=4, refresh=16, scorer="knorm")
    monkeypatch.setattr(settings, "_current", {"two ranks": (config, LONGEST)})
    monkeypatch.setattr(settings, "_shares", {"two ranks": shares})
    found = []
    for rank in (slice(0, 2), slice(2, 4)):
        for layer in (0, 1):
            impl = object.__new__(SparseKImpl)
            vars(impl).update(vllm_config=vllm_config, layer=layer, heads=rank, _budgets={},
                              max_model_len=LONGEST)  # fmt: skip
            found.append(impl.budget(16))
            # splits of decode follow from it: the same on all ranks
            assert impl._own_and_largest(16)[1].k == 1024
    assert [(b.k, b.heads) for b in found] == [
        (256, ()), (1024, ((1024, None), (512, None))),
        (512, ()), (768, ((256, None), (768, None))),
    ]  # fmt: skip


@pytest.fixture
def configured(tmp_path):
    """``configured(shares, **settings)``: settings with such a scorer file."""

    def make(shares, **settings):
        path = tmp_path / "scorer.safetensors"
        layer = {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}
        budgets = None if shares is None else torch.tensor(shares)
        save_scorer(path, ScorerFile(ScorerHeader(), {0: layer}, layer_budgets=budgets))
        return SparseKConfig(scorer_path=str(path), **settings)

    return make


def test_the_files_shares_count_unless_the_settings_say_uniform(configured):
    assert read_shares(configured([0.5, 1.5]), 2, 3) == ((0.5,), (1.5,))
    by_head = [[0.25, 0.5, 0.75], [2.0, 1.0, 1.5]]
    assert read_shares(configured(by_head), 2, 3) == tuple(map(tuple, by_head))
    for shares in ([0.5, 1.5], by_head):
        assert read_shares(configured(shares, layer_budgets="uniform"), 2, 3) is None
    assert read_shares(configured(None), 2, 3) is None
    assert read_shares(SparseKConfig(), 2, 3) is None


def test_shares_of_another_number_of_layers_or_heads_are_refused(configured):
    with pytest.raises(ScorerFileError, match=r"layer_budgets has shape \[2\].*needs \[3\]"):
        read_shares(configured([0.5, 1.5]), 3, 2)
    with pytest.raises(ScorerFileError, match=r"layer_budgets has shape \[1, 2\].*needs \[1, 4\]"):
        read_shares(configured([[0.5, 1.5]]), 1, 4)
    with pytest.raises(ScorerFileError, match=r"layer_budgets has shape \[1, 1, 2\].*needs \[1\]"):
        read_shares(configured([[[0.5, 1.5]]]), 1, 2)


def test_a_layer_of_which_only_some_heads_have_a_share_is_refused(configured):
    with pytest.raises(ScorerFileError, match=r"some KV heads of layer 1 .*layer_budgets=uniform"):
        read_shares(configured([[0.5, 1.5], [1.0, 0.0]]), 2, 2)


@pytest.mark.parametrize(
    ("shares", "dense"),
    [
        ([-1.0, 3.0], ()), ([0.0, 0.0], ()), ([2.0, 0.0], (0,)), ([[1.0, -1.0], [1.0, 1.0]], ()),
        ([[1.0, 2.0], [0.0, 0.0]], (0,)),
    ],
    ids=["negative", "all-zero", "zero-but-for-dense-layers", "negative-head", "zero-heads"],
)  # fmt: skip
def test_shares_that_leave_nothing_are_refused_with_a_remedy(shares, dense, configured):
    with pytest.raises(ScorerFileError, match="layer_budgets=uniform"):
        read_shares(configured(shares, dense_layers=dense), 2, 2)
