"""The SparseK operator: entmax's projection, its paper's gradient, and the prefix version."""

from __future__ import annotations

import pytest
import torch
from entmax import budget_bisect
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparsek.training.operator import prefix_threshold, sparsek

EXACT = 1e-12


def random(*shape, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype) * scale


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (40, 7), (300, 64), (1000, 999), (63, 2.5)])
def test_the_projection_is_entmaxs(n, k, scale):
    z = random(3, n, scale=scale)
    p = sparsek(z, k)
    torch.testing.assert_close(p, budget_bisect(z, budget=k, n_iter=100), rtol=0, atol=1e-9)
    torch.testing.assert_close(p.sum(-1), torch.full((3,), float(k), dtype=p.dtype))


def test_the_gradient_is_entmaxs_and_that_of_finite_differences():
    z, weight = random(3, 20).requires_grad_(), random(3, 20)
    (ours,) = torch.autograd.grad((sparsek(z, 4) * weight).sum(), z)
    (theirs,) = torch.autograd.grad((budget_bisect(z, budget=4, n_iter=100) * weight).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(lambda z: sparsek(z, 4), z)
    budgets = torch.tensor([1.0, 4.5, 19.0])
    assert torch.autograd.gradcheck(lambda z: sparsek(z, budgets), z)
    mask = random(3, 20) > -1
    assert torch.autograd.gradcheck(lambda z: sparsek(z, 4, mask), z)


@st.composite
def rows(draw):
    """A row of scores with ties and a budget, also one beyond the row."""
    values = st.one_of(st.integers(-3, 3).map(lambda v: v / 2), st.floats(-5, 5))
    z = torch.tensor(draw(st.lists(values, min_size=1, max_size=30)), dtype=torch.float64)
    return z, draw(st.one_of(st.integers(0, 35), st.floats(0.1, 30)))


@settings(max_examples=100, deadline=None)
@given(rows(), st.floats(-100, 100), st.randoms())
def test_any_projection_has_the_properties_of_sparsek(case, shift, shuffle):
    z, k = case
    p = sparsek(z, k)
    assert ((p >= 0) & (p <= 1)).all()
    assert abs(p.sum() - min(k, z.numel())) < EXACT * z.numel()
    torch.testing.assert_close(sparsek(z + shift, k), p, rtol=0, atol=1e-10)
    order = z.argsort()
    assert (p[order].diff() >= 0).all()
    places = list(range(z.numel()))
    shuffle.shuffle(places)
    torch.testing.assert_close(sparsek(z[places], k), p[places], rtol=0, atol=EXACT)
    # no other point of the set is nearer: moving mass between two entries does not help
    gain = (z - p).masked_fill(p >= 1, -torch.inf).max()
    loss = (z - p).masked_fill(p <= 0, torch.inf).min()
    assert gain <= loss + 1e-10


def test_equal_scores_share_and_scores_far_apart_do_not():
    assert sparsek(torch.full((8,), 1e30), 2).tolist() == [0.25] * 8
    assert sparsek(torch.arange(6.0) * 2, 3).tolist() == [0, 0, 0, 1, 1, 1]
    assert sparsek(torch.tensor([0.0, 0.5, 0.5, 9.0]), 2).tolist() == [0, 0.5, 0.5, 1]


def test_small_differences_between_large_scores_count():
    z = torch.tensor([-3e38, 0.0, 2.0**23, 2.0**23 + 1, 3e38])
    assert sparsek(z, 2).tolist() == [0, 0, 0, 1, 1]
    z = torch.tensor([1e15, 1e15 + 0.5, 1e15 + 1, -1e15], dtype=torch.float64)
    assert sparsek(z, 1).tolist() == [0, 0.25, 0.75, 0]


def test_scores_of_minus_infinity_and_masked_ones_do_not_compete():
    z = random(2, 30)
    mask = random(2, 31)[:, :30] > 0
    infinite = z.masked_fill(~mask, float("-inf"))
    for k in (3, 25):
        p = sparsek(z, k, mask)
        assert torch.equal(p, sparsek(infinite, k))
        assert (p[~mask] == 0).all()
        for row in range(2):
            assert torch.equal(p[row][mask[row]], sparsek(z[row][mask[row]], k))
    assert torch.equal(sparsek(z, 25, mask), mask.double())
    assert (sparsek(z, 3, torch.zeros(30, dtype=torch.bool)) == 0).all()


def test_every_row_may_have_its_own_budget():
    z = random(2, 3, 25)
    budgets = torch.tensor([[0, 1, 2.5], [24, 25, 60]])
    p = sparsek(z, budgets)
    for row in range(2):
        for column in range(3):
            expected = sparsek(z[row, column], budgets[row, column].item())
            assert torch.equal(p[row, column], expected)


@pytest.mark.parametrize("k", [5, 20], ids=["places-far-apart", "everything-fits"])
def test_rows_with_nothing_between_0_and_1_pass_no_gradient_on(k):
    z = (torch.arange(12.0) * 2).requires_grad_()
    sparsek(z, k).pow(2).sum().backward()
    assert (z.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_scores_give_the_exact_result_rounded_once(dtype):
    z = random(4, 200, scale=1.0).to(dtype).requires_grad_()
    weight = random(4, 200).to(dtype)
    wide = z.detach().double().requires_grad_()
    p, exact = sparsek(z, 20), sparsek(wide, 20)
    assert p.dtype == dtype
    assert torch.equal(p, exact.to(dtype))
    (p * weight).sum().backward()
    (exact * weight.double()).sum().backward()
    assert z.grad.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=bound, atol=bound)


def test_a_gate_that_rounds_to_one_still_has_a_gradient():
    z = torch.tensor([1.0, 0.002, 0.0], dtype=torch.bfloat16, requires_grad=True)
    p = sparsek(z, 1.0)
    assert p[0] == 1
    p[0].backward()
    assert z.grad[0] > 0


def test_arguments_that_do_not_fit_are_named():
    z = torch.zeros(2, 5)
    with pytest.raises(TypeError, match="z must be one of"):
        sparsek(z.int(), 1)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        sparsek(z, -1)
    with pytest.raises(ValueError, match=r"k must be a number or \(2,\), got \(5,\)"):
        sparsek(z, torch.ones(5))
    with pytest.raises(TypeError, match=r"mask must be torch.bool"):
        sparsek(z, 1, torch.ones(5))


def test_thresholds_of_prefixes_have_the_gradient_of_finite_differences():
    z = random(2, 18).requires_grad_()
    # while everything fits tau is a constant, too large for finite differences
    assert torch.autograd.gradcheck(lambda z: prefix_threshold(z, 5)[0][:, 5:], z)
    # scores far apart: tau is the highest that got no place
    assert torch.autograd.gradcheck(lambda z: prefix_threshold(z * 30, 5)[0][:, 5:], z)


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gates_from_thresholds_are_the_operator_over_every_prefix(dtype, scale):
    rows, n, k = 2, 40, 6
    z = random(rows, n, scale=scale, dtype=dtype).requires_grad_()
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    weight = random(rows, n, n, dtype=dtype) * causal
    tau, expiry = prefix_threshold(z, k)
    gates = (z[:, None] - tau[..., None]).clamp(0, 1) * causal
    expected = sparsek(z[:, None].expand(-1, n, -1), k, causal)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gates, expected, rtol=0, atol=atol)
    (got,) = torch.autograd.grad((gates * weight).sum(), z)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), z)
    torch.testing.assert_close(got, wanted, rtol=0, atol=10 * atol)
    assert expiry.dtype == torch.int32
    assert not expiry.requires_grad


def test_thresholds_take_any_leading_dimensions():
    z = random(2, 3, 30)
    tau, expiry = prefix_threshold(z, 4)
    for row in range(2):
        one_tau, one_expiry = prefix_threshold(z[row], 4)
        assert torch.equal(tau[row], one_tau)
        assert torch.equal(expiry[row], one_expiry)
