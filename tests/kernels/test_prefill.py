"""Prefill: several queries share a selection; the whole chain is held to brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from caches import EPS, NAN, assert_within_twice, build, chosen, eager_one, items_of
from interpreter import BF16, BITWISE

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.prefill import api, reference
from vllm_sparsek.kernels.select import api as select_api

F16, F32 = torch.float16, torch.float32


def split_items(chunks: list[tuple[int, int, int]], refresh: int):
    """Items of a batch of chunks (row, first position, tokens), one per refresh block.

    Returns:
        item_row, item_position, item_query_start, item_query_len, all [items] int32, and T.
    """
    items, start = [], 0
    for row, first, tokens in chunks:
        position = first
        while position < first + tokens:
            stop = min(first + tokens, (position // refresh + 1) * refresh)
            items.append((row, position, start, stop - position))
            start += stop - position
            position = stop
    return (*torch.tensor(items, dtype=torch.int32).T.contiguous(), start)


def attend(paged, query, items, units, gates, budget, scale, impl="triton"):
    """Output of one implementation, poisoned before."""
    device = paged.kv_cache.device
    out = torch.full_like(query, NAN, device=device)
    api.prefill(
        query.to(device), *paged.kv_cache.chunk(2, dim=-1), paged.block_table,
        *(i.to(device) for i in items), units.to(device),
        None if gates is None else gates.to(device), budget, scale, out, impl=impl,
    )  # fmt: skip
    return out.cpu()


BY_HEAD = Budget(1, 8, 4, 16).with_heads([(100, None), (8, 0.1)])
CASES = {
    # dtype, KV heads, G, D, page, chunks (row, first, tokens), budget, soft
    "r16-token": (F32, 2, 4, 64, 16, [(0, 0, 63), (1, 90, 21)], Budget(16, 8, 4, 16), False),
    "r64-bf16-g3": (BF16, 1, 3, 128, 16, [(0, 100, 80)], Budget(32, 33, 5, 64), False),
    "r1-g7-fp16-soft": (F16, 1, 7, 80, 32, [(0, 0, 3), (1, 95, 5)], Budget(16, 4, 3, 1), True),
    "r64-page16-unit": (F32, 2, 2, 64, 16, [(0, 37, 70)], Budget(48, 20, 17, 64, 16), True),
    "r64-d256-page128": (BF16, 1, 1, 256, 128, [(0, 600, 20)], Budget(128, 9, 1, 64, 128), False),
    "r16-d96-mqa": (F32, 1, 5, 96, 32, [(0, 0, 1), (1, 110, 20)], Budget(16, 1, 0, 16), False),
    "r16-share": (F32, 1, 3, 64, 16, [(0, 180, 30)], Budget(8, 8, 2, 16, k_share=0.15), True),
    "heads": (F32, 2, 3, 64, 16, [(0, 0, 63), (1, 180, 40)], BY_HEAD, False),
    "heads-soft": (BF16, 2, 1, 64, 16, [(0, 150, 80)], BY_HEAD, True),
    "heads-page": (F32, 2, 2, 64, 16, [(0, 150, 80)], replace(BY_HEAD, unit=16), False),
    "sinks-beyond-chunk": (F32, 1, 4, 64, 16, [(0, 0, 20)], Budget(8, 4, 48, 16), False),
}


def problem(case, seed=0):
    """Cache, queries, items (two of them padding) and the reference's selection."""
    dtype, heads, group, head_dim, page, chunks, budget, soft = case
    lengths = [first + tokens for _, first, tokens in chunks]
    paged = build(lengths, heads, head_dim, page, dtype, seed=seed)
    *items, total = split_items(chunks, budget.refresh)
    padding = torch.tensor([-1, -1], dtype=torch.int32)
    items = [torch.cat([items[0], padding]), *(torch.cat([i, 0 * padding]) for i in items[1:])]
    generator = torch.Generator().manual_seed(seed + 5)
    # two more rows of queries than the items own, as in a padded batch
    query = torch.randn((total + 2, heads * group, head_dim), generator=generator).to(dtype)
    units, gates = chosen(paged, items[0], items[1], budget, soft)
    return paged, query, items, units, gates, budget, head_dim**-0.5


def hold_to_float64(case, device, impls):
    """The error of every implementation is at most twice that of eager attention."""
    paged, query, items, units, gates, budget, scale = problem(case)
    exact = torch.full(query.shape, NAN, dtype=torch.float64)
    shared = len(paged.lengths), -1, -1, -1
    reference.prefill(
        query.double().expand(shared), *paged.kv_cache.double().chunk(2, dim=-1),
        paged.block_table, *items, units, gates, budget, scale, exact.expand(shared),
    )  # fmt: skip
    eager = torch.full_like(query, NAN)
    for item, (row, position, start, length) in enumerate(
        zip(*(i.tolist() for i in items), strict=True)
    ):
        for offset in range(length):
            eager[start + offset] = eager_one(
                query[start + offset], paged.kv_cache, paged.block_table[row], position + offset,
                units[item], None if gates is None else gates[item], budget, scale,
            )  # fmt: skip
    for impl in impls:
        out = attend(paged.to(device), query, items, units, gates, budget, scale, impl=impl)
        assert out[-2:].isnan().all(), impl
        assert_within_twice(out[:-2], eager[:-2], exact[:-2], EPS[query.dtype])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_prefill_is_as_exact_as_low_precision_attention(case, device):
    hold_to_float64(case, device, ["triton"] if device.type == "cuda" else ["triton", "cpu"])


BRUTE_FORCE = {
    "r1": (2, Budget(10, 8, 3, 1), 70),
    "r16-mha": (1, Budget(16, 5, 0, 16), 63),
    "r64": (3, Budget(12, 1, 4, 64), 111),
    "share": (1, Budget(4, 8, 2, 16, k_share=0.2), 80),
    "heads": (2, Budget(1, 5, 2, 16).with_heads([(4, None), (24, None), (8, 0.2)]), 70),
    "all-fits": (1, Budget(60, 8, 2, 16), 63),
    "one-token": (1, Budget(4, 1, 0, 1), 1),
}


@pytest.mark.parametrize("case", BRUTE_FORCE.values(), ids=BRUTE_FORCE.keys())
@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_select_and_prefill_together_are_what_brute_force_says(case, impl, device):
    if impl != "triton" and device.type == "cuda":
        pytest.skip("runs on the CPU")
    group, budget, n = case
    heads, head_dim = max(1, len(budget.heads)), 64
    paged = build([n], heads, head_dim, 16, levels=12 if group == 3 else None)
    query = torch.randn(n, heads * group, head_dim, generator=torch.Generator().manual_seed(9))
    # numpy scores: the definition compares single numbers, which tensors do slowly
    expected = reference.brute_force(
        query.double(), paged.key[0], paged.value[0], paged.token_scores[0].numpy(), budget, 0.1
    )
    *items, _ = split_items([(0, 0, n)], budget.refresh)
    there = paged.to(device)
    units = torch.full((items[0].numel(), heads, budget.max_units(n)), 77, dtype=torch.int32)
    units = units.to(device)
    select_api.select(
        there.scores, there.block_table, items[0].to(device), items[1].to(device), budget, "lse",
        False, units, impl=impl,
    )  # fmt: skip
    out = attend(there, query, items, units, None, budget, 0.1, impl=impl)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("by_head", [False, True], ids=["layer", "heads"])
@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_outputs_are_bitwise_the_same_however_a_prompt_is_chunked(unit, by_head, device):
    n, budget = 150, Budget(k=32, window=11, sinks=3, refresh=64, unit=unit)
    if by_head:
        budget = budget.with_heads([(16, None), (80, None)])
    paged = build([n], 2, 64, 16)
    query = torch.randn(n, 6, 64, generator=torch.Generator().manual_seed(9))
    results = []
    for cuts in ([0, 150], [0, 1, 70, 77, 128, 150], [0, 64, 149, 150]):
        out = torch.full_like(query, NAN)
        for first, stop in itertools.pairwise(cuts):
            *items, _ = split_items([(0, first, stop - first)], budget.refresh)
            units, _ = chosen(paged, items[0], items[1], budget)
            out[first:stop] = attend(
                paged.to(device), query[first:stop], items, units, None, budget, 0.125
            )
        results.append(out)
    assert not results[0].isnan().any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=BITWISE)


def test_prefill_of_one_query_is_decode(device):
    paged = build([200, 90], 2, 64, 16)
    row, position = items_of([(0, 199), (1, 70)])
    budget = Budget(k=32, window=11, sinks=3, refresh=16)
    units, gates = chosen(paged, row, position, budget, True)
    query = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(9))
    start, length = torch.tensor([0, 1]).int(), torch.tensor([1, 1]).int()
    there = paged.to(device)
    out = attend(there, query, [row, position, start, length], units, gates, budget, 0.125)
    decoded = torch.full_like(query, NAN, device=device)
    decode_api.decode(
        query.to(device), there.kv_cache, there.block_table, row.to(device), position.to(device),
        units.to(device), gates.to(device), budget, 0.125, decoded, impl="triton",
    )  # fmt: skip
    torch.testing.assert_close(out, decoded.cpu(), rtol=0, atol=2e-6)


def test_items_may_own_any_rows_of_the_batch(device):
    paged, query, items, units, gates, budget, scale = problem(CASES["r16-token"])
    there = paged.to(device)
    expected = attend(there, query, items, units, gates, budget, scale)
    order = torch.randperm(items[0].numel(), generator=torch.Generator().manual_seed(2))
    shuffled = attend(there, query, [i[order] for i in items], units[order], None, budget, scale)
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_blocks_and_queries_beyond_two_to_the_31_elements_are_found(device):
    case = (BF16, 2, 4, 128, 16, [(0, 200, 100)], Budget(64, 16, 4, 64), False)
    paged, query, items, units, gates, budget, scale = problem(case)
    expected = attend(paged.to(device), query, items, units, gates, budget, scale)
    used, heads, page, width = paged.kv_cache.shape
    stride = (1 << 31) // (used - 2) // 64 * 64
    storage = torch.empty(stride * used, dtype=BF16, device=device)
    strides = (stride, page * width, width, 1)
    far = storage.as_strided((used, heads, page, width), strides).copy_(paged.kv_cache)
    paged = paged.to(device)
    paged.kv_cache = far
    out = attend(paged, query, items, units, gates, budget, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
