"""Prefill by the Gluon kernel for Hopper, against float64. Gluon has no interpreter."""

from __future__ import annotations

import itertools

import pytest
import test_prefill
import torch
from caches import NAN, build, chosen
from test_prefill import attend, problem, split_items

from vllm_sparsek.kernels.common.budget import Budget

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

CASES = {
    # the cases of the other kernels that it takes
    **{
        name.removesuffix("-soft"): (F16 if dtype == F32 else dtype, heads, g, d, *rest, False)
        for name, (dtype, heads, g, d, *rest, _) in test_prefill.CASES.items()
        if d in (64, 128)
    },
    "r128-mha": (F16, 2, 1, 128, 16, [(0, 0, 700), (1, 389, 300)], Budget(96, 65, 3, 128), False),
    "r64-g4": (BF16, 2, 4, 128, 16, [(0, 0, 333), (1, 600, 130)], Budget(300, 65, 3, 64), False),
    "r256-page": (F16, 1, 1, 128, 16, [(0, 512, 513)], Budget(256, 128, 16, 256, 16), False),
    "r64-g5-odd-heads": (BF16, 3, 5, 64, 32, [(0, 100, 201)], Budget(64, 33, 5, 64), False),
    "a-chunk-within-a-block": (F16, 1, 4, 128, 16, [(0, 900, 7)], Budget(400, 65, 0, 64), False),
    # the second tile of queries has rows for one group of warps alone
    "r192-mha": (F16, 2, 1, 128, 16, [(0, 700, 600)], Budget(512, 65, 3, 192), False),
    "r192-long": (F16, 2, 1, 128, 16, [(0, 2100, 300)], Budget(1700, 65, 3, 192), False),
    "long-lists": (BF16, 1, 4, 128, 16, [(0, 2200, 140)], Budget(1700, 65, 3, 64), False),
    "long-lists-page": (F16, 2, 1, 128, 16, [(0, 2100, 300)], Budget(1600, 64, 0, 128, 16), False),
    "many-tiles-a-program": (F16, 6, 2, 64, 16, [(0, 0, 2500)], Budget(96, 65, 3, 64), False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_prefill_is_as_exact_as_low_precision_attention(case, device):
    test_prefill.hold_to_float64(case, device, ["hopper"])


@pytest.mark.parametrize("by_head", [False, True], ids=["layer", "heads"])
@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_outputs_are_bitwise_the_same_however_a_prompt_is_chunked(unit, by_head, device):
    n, budget = 450, Budget(k=96, window=11, sinks=3, refresh=128, unit=unit)
    if by_head:
        budget = budget.with_heads([(48, None), (160, None)])
    paged = build([n], 2, 128, 16, BF16)
    query = torch.randn(n, 6, 128, generator=torch.Generator().manual_seed(9)).to(BF16)
    results = []
    for cuts in ([0, 450], [0, 1, 70, 77, 128, 150, 400, 450], [0, 64, 449, 450]):
        out = torch.full_like(query, NAN)
        for first, stop in itertools.pairwise(cuts):
            *items, _ = split_items([(0, first, stop - first)], budget.refresh)
            units, _ = chosen(paged, items[0], items[1], budget)
            out[first:stop] = attend(
                paged.to(device), query[first:stop], items, units, None, budget, 0.09, "hopper"
            )
        results.append(out)
    assert not results[0].isnan().any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_runs_over_the_same_lists_give_the_same_bits(device):
    """Copies that are not waited for would show as results that differ."""
    case = (F16, 4, 2, 128, 16, [(0, 0, 4000)], Budget(500, 128, 4, 128), False)
    paged, query, items, units, gates, budget, scale = problem(case)
    there = paged.to(device)
    first = attend(there, query, items, units, gates, budget, scale, "hopper")
    close = attend(there, query, items, units, gates, budget, scale, "triton")
    torch.testing.assert_close(first[:-2], close[:-2], rtol=2e-3, atol=2e-3)
    for _ in range(20):
        again = attend(there, query, items, units, gates, budget, scale, "hopper")
        torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


def test_blocks_and_queries_beyond_two_to_the_31_elements_are_found(device):
    case = (BF16, 2, 4, 128, 16, [(0, 200, 100)], Budget(64, 16, 4, 64), False)
    paged, query, items, units, gates, budget, scale = problem(case)
    expected = attend(paged.to(device), query, items, units, gates, budget, scale, "hopper")
    used, heads, page, width = paged.kv_cache.shape
    stride = (1 << 31) // (used - 2) // 256 * 256
    storage = torch.empty(stride * used, dtype=BF16, device=device)
    strides = (stride, page * width, width, 1)
    far = storage.as_strided((used, heads, page, width), strides).copy_(paged.kv_cache)
    paged = paged.to(device)
    paged.kv_cache = far
    out = attend(paged, query, items, units, gates, budget, scale, "hopper")
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


REFUSED = {
    "float32": (F32, 64, False, "query is torch.float32"),
    "gates": (F16, 64, True, "gates are given"),
    "head_dim": (F16, 80, False, "head_dim is 80"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do_is_refused_by_name_and_left_to_others_by_auto(case, device):
    dtype, head_dim, soft, message = case
    problem_ = (dtype, 1, 4, head_dim, 16, [(0, 100, 80)], Budget(32, 33, 5, 64), soft)
    paged, query, items, units, gates, budget, scale = problem(problem_)
    there = paged.to(device)
    with pytest.raises(ValueError, match=f"impl 'hopper' does not fit: {message}"):
        attend(there, query, items, units, gates, budget, scale, "hopper")
    assert not attend(there, query, items, units, gates, budget, scale, "auto")[:-2].isnan().any()


def test_without_a_hopper_gpu_it_is_refused(device, monkeypatch):
    paged, query, items, units, gates, budget, scale = problem(CASES["r64-g4"])
    hopper = pytest.importorskip("vllm_sparsek.kernels.prefill.hopper")
    monkeypatch.setattr(hopper, "compute_capability", lambda _: 80)
    with pytest.raises(ValueError, match=r"compute capability 9\.0"):
        attend(paged.to(device), query, items, units, gates, budget, scale, "hopper")
