"""Run every Triton kernel once on small shapes on a GPU and compare with the reference.

compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import test_write
import torch
from caches import NAN, build, chosen, items_of, kept_lists, paged_view, quantised, slots

from vllm_sparsek import attention_forward, compat
from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.bounds import reference as bounds_reference
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.validate import compute_capability
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.decode import reference as decode_reference
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.prefill import reference as prefill_reference
from vllm_sparsek.kernels.score import api as score_api
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select import expiry
from vllm_sparsek.kernels.select import reference as select_reference

DEVICE = torch.device("cuda", 0)
TOLERANCE = 2e-2  # of bfloat16 outputs of magnitude up to about four
LENGTHS = [1, 63, 400]


def compare(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Print one line; raise if values or the places of NaN differ."""
    got = got.float().cpu()
    expected = expected.float()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, equal_nan=True, msg=name)
    print(f"ok  {name}", flush=True)


def score(head_dim: int, page: int) -> None:
    """write_scores and keydiff."""
    paged = build(LENGTHS, 2, head_dim, page, torch.bfloat16)
    there = paged.to(DEVICE)
    blocks = paged.kv_cache.shape[0]
    u, slot = torch.randn(page, 2), torch.randperm(blocks * page)[:page]
    start = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ends = torch.tensor(LENGTHS, dtype=torch.int32)
    results = []
    for device, cache, table, impl in (
        (torch.device("cpu"), paged.kv_cache, paged.block_table, "reference"),
        (DEVICE, there.kv_cache, there.block_table, "triton"),
    ):
        written = paged_view(blocks, 2, page, 1, torch.float32, device)[..., 0]
        score_api.write_scores(u.to(device), slot.to(device), written, impl=impl)
        scores = paged_view(blocks, 2, page, 1, torch.float32, device)[..., 0]
        anchors = paged_view(blocks, 2, page, head_dim, torch.float32, device)[:, :, 0]
        score_api.keydiff(
            cache, table, start.to(device), ends.to(device), scores, anchors, impl=impl
        )
        results.append((written, scores, anchors))
    for name, expected, got in zip(("write", "keydiff", "anchors"), *results, strict=True):
        compare(f"{name} D={head_dim} page={page}", got, expected, 1e-4)


def write(name: str) -> None:
    """write_tokens, the cases of its tests."""
    case = test_write.CASES[name]
    expected = test_write.run(case, "reference", torch.device("cpu"))
    got = test_write.run(case, "triton", DEVICE)
    compare(f"write {name}: keys, values", got[0], expected[0], 0)
    compare(f"write {name}: scores", got[1], expected[1], 1e-4)


def by_query(head_dim: int, page: int, group: int, budget: Budget) -> None:
    """write_bounds and select_by_query, with whole numbers so that all sums are exact."""
    label = f"D={head_dim} page={page} G={group} unit={budget.unit}"
    paged = build(LENGTHS, 2, head_dim, page, torch.bfloat16)
    paged.kv_cache.copy_((paged.kv_cache * 2).round().clamp(-4, 4))
    there = paged.to(DEVICE)
    blocks = paged.kv_cache.shape[0]
    mapping = torch.cat([slots(paged.block_table, r, torch.arange(n), page)
                         for r, n in enumerate(LENGTHS)] + [torch.full((9,), -1)])  # fmt: skip
    expected = torch.full((blocks, 2, page // budget.unit, 2, head_dim), NAN).bfloat16()
    got = expected.to(DEVICE)
    bounds_reference.write_bounds(paged.kv_cache, mapping, expected)
    bounds_api.write_bounds(there.kv_cache, mapping.to(DEVICE), got)
    compare(f"bounds {label}", got, expected, 0)

    row, position = items_of([(-1, 0), *((r, n - 1) for r, n in enumerate(LENGTHS))])
    query = torch.randint(-1, 2, (row.numel(), 2 * group, head_dim)).bfloat16()
    units = bounds_reference.select_by_query(
        query, expected, paged.block_table, row, position, budget, budget.max_units(400)
    )
    got_units = torch.full(units.shape, 77, dtype=torch.int32, device=DEVICE)
    bounds_api.select_by_query(
        query.to(DEVICE), got, there.block_table, row.to(DEVICE), position.to(DEVICE), budget,
        got_units,
    )  # fmt: skip
    compare(f"select by query {label}", got_units, units, 0)


def walk(heads: int, page: int, pooling: str, budget: Budget, levels: int | None = None) -> None:
    """Pooled page scores, and selections of many items of a row by one walk over them."""
    label = f"page={page} {pooling} R={budget.refresh} heads={len(budget.heads)} {levels=}"
    paged = build(LENGTHS, heads, 8, page, levels=levels)
    there = paged.to(DEVICE)
    every = [(r, p) for r, n in enumerate(LENGTHS) for p in range(0, n, 13)]
    # rows and positions in no order, as kernels must not rely on one
    row, position = items_of([*every[::-1], (-1, 0), *every[:3]])
    pages = paged.block_table.shape[1]
    assert expiry.pays(budget, row.numel(), len(LENGTHS), pages), "no walk would be taken"
    units, _ = select_reference.select(
        paged.scores, paged.block_table, row, position, budget, pooling,
        max_units=budget.max_units(max(LENGTHS)) + 2,
    )  # fmt: skip
    got = torch.full(units.shape, 77, dtype=torch.int32, device=DEVICE)
    select_api.select(
        there.scores, there.block_table, row.to(DEVICE), position.to(DEVICE), budget, pooling,
        False, got,
    )  # fmt: skip
    compare(f"select by a walk {label}", got, units, 0)


def kept(unit: int, pooling: str, high: float) -> None:
    """Lists that are kept, of a context that fits no tile; see ``kept_lists``."""
    for step, (got, expected) in enumerate(kept_lists(16, unit, pooling, high, DEVICE)):
        compare(f"select a list that is kept {unit=} {pooling} {high=} {step=}", got, expected, 0)


def hopper_fits(*arguments: Any) -> bool:
    """Whether the prefill kernel for Hopper runs here and takes what ``fits`` is given."""
    if compute_capability(DEVICE) != 90:
        return False
    from vllm_sparsek.kernels.prefill import hopper

    return hopper.fits(*arguments)[0]


def attention(
    head_dim: int, page: int, group: int, budget: Budget, soft: bool, fp8: bool = False
) -> None:
    """Select, decode and prefill."""
    label = (
        f"D={head_dim} page={page} G={group} unit={budget.unit} R={budget.refresh} "
        f"heads={len(budget.heads)} {soft=} {fp8=}"
    )
    heads, scale = 2, head_dim**-0.5
    paged = build(LENGTHS, heads, head_dim, page, torch.bfloat16)
    kv_scales = on_gpu_scales = None
    if fp8:
        paged, kv_scales = quantised(paged)
        on_gpu_scales = (kv_scales[0].to(DEVICE), kv_scales[1].to(DEVICE))
    there = paged.to(DEVICE)
    row, position = items_of([(-1, 0), *((r, n - 1) for r, n in enumerate(LENGTHS))])
    on_gpu = row.to(DEVICE), position.to(DEVICE)
    units, gates = chosen(paged, row, position, budget, soft)
    got = torch.full(units.shape, 77, dtype=torch.int32, device=DEVICE)
    got_gates = torch.full(units.shape, NAN, device=DEVICE) if soft else None
    select_api.select(there.scores, there.block_table, *on_gpu, budget, "lse", soft, got, got_gates)
    compare(f"select {label}", got, units, 0)
    if soft:
        compare(f"gates {label}", got_gates, gates, 1e-4)

    query = torch.randn(row.numel(), heads * group, head_dim).bfloat16()
    expected = torch.full_like(query, NAN)
    decode_reference.decode(
        query, paged.kv_cache, paged.block_table, row, position, units, gates, budget, scale,
        expected, kv_scales,
    )  # fmt: skip
    impls = ["triton"]
    if not soft and not fp8 and compat.flash_attention_3()[0] is not None:
        impls.append("fa3")
    for impl in impls:
        out = torch.full_like(query, NAN, device=DEVICE)
        decode_api.decode(
            query.to(DEVICE), there.kv_cache, there.block_table, *on_gpu, got, got_gates, budget,
            scale, out, kv_scales=on_gpu_scales, impl=impl,
        )  # fmt: skip
        compare(f"decode {impl} {label}", out, expected, TOLERANCE)

    # the last queries of the two longer requests, one item each
    first = [max(0, (n - 1) // budget.refresh * budget.refresh) for n in LENGTHS[1:]]
    length = [n - f for n, f in zip(LENGTHS[1:], first, strict=True)]
    start = list(itertools.accumulate(length, initial=0))
    row, position = items_of([(1, first[0]), (2, first[1])])
    items = [row, position, torch.tensor(start[:2]).int(), torch.tensor(length).int()]
    units, gates = chosen(paged, row, position, budget, soft)
    query = torch.randn(start[2] + 1, heads * group, head_dim).bfloat16()
    expected = torch.full_like(query, NAN)
    prefill_reference.prefill(
        query[None].expand(len(LENGTHS), -1, -1, -1), *paged.kv_cache.chunk(2, dim=-1),
        paged.block_table, *items, units, gates, budget, scale,
        expected[None].expand(len(LENGTHS), -1, -1, -1), kv_scales,
    )  # fmt: skip
    if hopper_fits(query.to(DEVICE), *there.kv_cache.chunk(2, dim=-1), gates, budget):
        impls.append("hopper")
    for impl in impls:
        out = torch.full_like(query, NAN, device=DEVICE)
        prefill_api.prefill(
            query.to(DEVICE), *there.kv_cache.chunk(2, dim=-1), there.block_table,
            *(i.to(DEVICE) for i in items), units.to(DEVICE),
            None if gates is None else gates.to(DEVICE), budget, scale, out, on_gpu_scales,
            impl=impl,
        )  # fmt: skip
        compare(f"prefill {impl} {label}", out, expected, TOLERANCE)


def dense_layout(settings: dict, queries: int) -> None:
    """attention_forward on tensors that end where their last token ends."""
    q = torch.randn(2, 4, queries, 80).half()
    k, v = torch.randn(2, 2, 301, 80).half(), torch.randn(2, 301, 2, 80).half().transpose(1, 2)
    scores = torch.randn(2, 2, 301)
    expected = attention_forward(q, k, v, scores=scores, config=settings, impl="reference")
    out = attention_forward(
        q.to(DEVICE), k.to(DEVICE), v.transpose(1, 2).to(DEVICE).transpose(1, 2),
        scores=scores.to(DEVICE), config=settings,
    )  # fmt: skip
    compare(f"dense layout {queries=} {settings}", out, expected, TOLERANCE)


def main() -> int:
    """Run all; returns the exit code."""
    if not torch.cuda.is_available():
        print("needs a CUDA GPU")
        return 1
    torch.manual_seed(0)
    for name in test_write.CASES:
        write(name)
    score(128, 16)
    score(80, 48)
    by_query(128, 16, 4, Budget(64, 16, 4, 1, 16))
    by_query(80, 48, 7, Budget(96, 9, 20, 16, 48))
    by_query(256, 128, 3, Budget(32, 9, 1, 64, 16, 0.3))
    # the largest of a page is exact; no two scores of the other poolings differ by so little that
    # rounding decides
    walk(2, 16, "max", Budget(48, 20, 3, 16, 16))
    walk(5, 16, "max", Budget(64, 20, 0, 16, 16), levels=2)
    walk(3, 48, "lse", Budget(96, 33, 40, 64, 48))
    walk(3, 16, "mean", Budget(1, 16, 5, 1, 16).with_heads([(40, None), (3, None), (300, None)]))
    kept(1, "lse", 0.0)
    kept(1, "lse", 9.0)
    kept(16, "max", 0.0)
    attention(128, 16, 4, Budget(64, 16, 4, 1), False)
    attention(128, 16, 4, Budget(64, 16, 4, 64, 16), False)
    # more kept than there is: the kernel for Hopper takes its larger tiles
    attention(128, 16, 4, Budget(1600, 16, 4, 64), False)
    attention(80, 32, 7, Budget(40, 9, 33, 16), True)
    attention(256, 128, 3, Budget(128, 9, 1, 64, 128), True)
    attention(64, 16, 1, Budget(8, 8, 2, 16, 1, 0.15), False)
    attention(128, 16, 4, Budget(64, 16, 4, 64, 16), False, fp8=True)
    attention(128, 16, 4, Budget(1, 16, 4, 64).with_heads([(300, None), (16, 0.2)]), False)
    attention(64, 16, 4, Budget(1, 16, 4, 16, 16).with_heads([(32, None), (96, None)]), True)
    dense_layout({"k": 48, "window": 9, "sinks": 3}, 301)
    dense_layout({"k": 48, "window": 9, "sinks": 17, "granularity": "page"}, 7)
    dense_layout({"k": 32, "window": 9, "sinks": 0, "refresh": 1, "mode": "soft_v"}, 40)
    torch.cuda.synchronize()
    print("all kernels agree with their references")
    return 0


if __name__ == "__main__":
    sys.exit(main())
