"""Prefix: all implementations agree with the per-prefix definition and with select."""

from __future__ import annotations

import pytest
import torch
from caches import NAN, build, items_of
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.projection import sparsek_gates
from vllm_sparsek.kernels.prefix import api
from vllm_sparsek.kernels.select import reference as select_reference

IMPLEMENTATIONS = ("triton",) if DEVICE == "cuda" else ("triton", "cpu")
LOWEST = torch.finfo(torch.float32).min
# float64 inside: what is left is the rounding of the result
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def run(scores, k, impl):
    """tau and expiry in poisoned outputs whose rows lie apart, as the scores' do."""
    device = "cpu" if impl in ("cpu", "reference") else DEVICE
    rows, n = scores.shape
    apart = torch.full((rows, n + 3), NAN, dtype=scores.dtype, device=device)
    apart[:, :n] = scores
    tau = torch.full_like(apart, NAN)
    expiry = torch.full(apart.shape, -7, dtype=torch.int32, device=device)
    api.prefix(apart[:, :n], k, tau[:, :n], expiry[:, :n], impl=impl)
    assert tau[:, n:].isnan().all()
    assert (expiry[:, n:] == -7).all()
    return tau[:, :n].cpu(), expiry[:, :n].cpu()


def agree(scores, k):
    """Every implementation gives the reference's result."""
    expected_tau, expected_expiry = run(scores, k, "reference")
    tolerance = TOLERANCE[scores.dtype]
    for impl in IMPLEMENTATIONS:
        tau, expiry = run(scores, k, impl)
        assert torch.equal(expiry, expected_expiry), impl
        torch.testing.assert_close(tau, expected_tau, rtol=tolerance, atol=tolerance)
    return expected_tau, expected_expiry


def random(n, scale=1.0, rows=2):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(n)) * scale


def sometimes(value, n):
    """Random scores, a third of which are ``value``."""
    chosen = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.33
    return torch.where(chosen, value, random(n))


CASES = {
    "one": (random(1), 1),
    "k-1": (random(63), 1),
    "k-7": (random(111), 7),
    "k-n-minus-1": (random(63), 62),
    "k-n": (random(63), 63),
    "k-beyond-n": (random(17), 400),
    "flat": (random(63, 0.01), 7),
    "steep": (random(63, 30.0), 7),
    "ties": (random(63).round(), 7),
    "ties-a-half-apart": ((random(63) * 2).round() / 2, 7),
    "all-equal": (torch.zeros(2, 63), 7),
    "ascending": (torch.arange(40.0)[None] / 8, 5),
    "descending": (-torch.arange(40.0)[None] / 8, 5),
    "minus-infinity": (sometimes(float("-inf"), 63), 7),
    "lowest": (sometimes(LOWEST, 63), 7),
    "masked-by-a-large-number": (sometimes(-1e30, 63), 7),
    "all-sizes": (random(63) * 10.0 ** torch.linspace(-20, 30, 63)[torch.randperm(63)], 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_thresholds_and_expiry_times_are_those_of_every_prefix_alone(case, dtype):
    scores, k = case
    agree(scores.to(dtype), k)


@st.composite
def rows_of_scores(draw):
    """A row with ties, scores half apart, far apart, and some that do not compete."""
    values = st.one_of(
        st.integers(-3, 3).map(lambda v: v / 2),
        st.floats(-4, 4, width=32),
        st.sampled_from([float("-inf"), -1e30, 1e6]),
    )
    row = draw(st.lists(values, min_size=1, max_size=24))
    return torch.tensor([row], dtype=torch.float32), draw(st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(rows_of_scores())
def test_any_row_agrees_and_thresholds_never_decrease(case):
    tau, expiry = agree(*case)
    assert (tau.diff() >= 0).all()
    assert (expiry >= torch.arange(tau.shape[1])).all()


def test_gates_of_every_prefix_are_those_of_the_operator():
    scores, k = random(80, 2.0), 9
    for impl in (*IMPLEMENTATIONS, *(["reference"] if DEVICE == "cpu" else [])):
        tau, _ = run(scores, k, impl)
        for i in range(80):
            gates = (scores[:, : i + 1] - tau[:, i : i + 1]).clamp(0, 1)
            expected = sparsek_gates(scores[:, : i + 1], k).float()
            torch.testing.assert_close(gates, expected, rtol=0, atol=2e-6)
            if i < k:
                assert (gates == 1).all()


def test_an_entry_that_does_not_compete_never_has_a_gate():
    scores = sometimes(float("-inf"), 40)
    for k in (3, 30):
        tau, _ = run(scores, k, IMPLEMENTATIONS[0])
        gates = (scores[:, None] - tau[:, :, None]).clamp(0, 1)
        assert (gates[(scores == float("-inf"))[:, None].expand_as(gates)] == 0).all()


def test_expiry_shifted_by_sinks_and_window_is_what_select_keeps():
    n, sinks, window, k = 90, 5, 16, 12
    paged = build([n], 1, 8, 16, levels=40)
    scores = paged.token_scores[0].T[:, sinks:].contiguous()
    _, expiry = run(scores, k, IMPLEMENTATIONS[0])
    budget = Budget(k, window, sinks, refresh=1)
    row, position = items_of([(0, i) for i in range(n)])
    units, _ = select_reference.select(
        paged.scores, paged.block_table, row, position, budget, "lse"
    )
    for i in range(n):
        kept = [u for u in units[i, 0].tolist() if u >= 0]
        left = range(sinks, max(sinks, i - window + 1))
        assert kept == [j for j in left if i < expiry[0, j - sinks] + sinks + window]


def test_a_long_row_has_k_places_at_every_position():
    scores, k = random(3000, 0.7, rows=1), 257
    impl = "triton" if DEVICE == "cuda" else "cpu"
    tau, expiry = run(scores, k, impl)
    for i in (256, 257, 300, 1000, 2999):
        visible = i < expiry[0, : i + 1]
        expected = scores[0, : i + 1].topk(k).indices
        assert set(visible.nonzero()[:, 0].tolist()) == set(expected.tolist())
        if i >= k:
            mass = (scores[0, : i + 1].double() - tau[0, i]).clamp(0, 1).sum()
            assert abs(mass - k) < 1e-3


def test_arguments_that_do_not_fit_are_named():
    scores, out = torch.zeros(2, 5), torch.zeros(2, 5)
    expiry = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        api.prefix(scores, 0, out, expiry)
    with pytest.raises(TypeError, match="scores must be"):
        api.prefix(scores.half(), 1, out, expiry)
    with pytest.raises(ValueError, match="expiry_out must have shape"):
        api.prefix(scores, 1, out, expiry[:, :4])


def test_no_rows_and_no_scores_are_no_error():
    for shape in ((0, 5), (3, 0)):
        for impl in (*IMPLEMENTATIONS, *(["reference"] if DEVICE == "cpu" else [])):
            run(torch.zeros(shape), 2, impl)


@pytest.mark.gpu
def test_128k_scores_and_8k_places_are_those_of_the_cpu(device):
    scores, k = random(1 << 17, rows=2), 8192
    tau, expiry = run(scores, k, "triton")
    expected_tau, expected_expiry = run(scores, k, "cpu")
    assert torch.equal(expiry, expected_expiry)
    torch.testing.assert_close(tau, expected_tau, rtol=1e-6, atol=1e-6)
