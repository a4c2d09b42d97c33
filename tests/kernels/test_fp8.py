"""A float8_e4m3fn cache: attention over what it holds times its scales, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from caches import (
    EPS,
    FP8,
    NAN,
    SCALES,
    assert_within_twice,
    build,
    chosen,
    eager_one,
    items_of,
    paged_view,
    quantised,
    slots,
)
from interpreter import BF16

from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.bounds import reference as bounds_reference
from vllm_sparsek.kernels.common import validate
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.decode import reference as decode_reference
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.score import api as score_api

F16, F32 = torch.float16, torch.float32
CASES = {
    # dtype of queries, KV heads, G, D, page, context lengths, budget, soft
    "d64-g4-token": (F32, 2, 4, 64, 16, [1, 63, 300], Budget(32, 16, 4, 1), False),
    "d128-g3-bf16": (BF16, 2, 3, 128, 16, [111, 300], Budget(40, 33, 5, 16), False),
    "d80-g7-fp16-soft": (F16, 1, 7, 80, 32, [63, 300], Budget(40, 16, 3, 1), True),
    "d256-bf16-page128-unit": (BF16, 1, 2, 256, 128, [500], Budget(256, 64, 9, 64, 128), False),
    "mqa-many-splits": (F32, 1, 20, 64, 16, [1000], Budget(600, 50, 4, 1), False),
    "all-fits": (F32, 2, 3, 64, 16, [63, 111], Budget(4000, 16, 4, 1), False),
}


def implementations(device):
    return ("triton",) if device.type == "cuda" else ("triton", "cpu", "reference")


def problem(case):
    """A quantised cache, its scales, one query a request and the reference's selection."""
    dtype, heads, group, head_dim, page, lengths, budget, soft = case
    paged, kv_scales = quantised(build(lengths, heads, head_dim, page))
    row, position = items_of([(-1, 3), *((r, n - 1) for r, n in enumerate(lengths))])
    generator = torch.Generator().manual_seed(5)
    shape = (row.numel(), heads * group, head_dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    units, gates = chosen(paged, row, position, budget, soft)
    return paged, kv_scales, query, (row, position), units, gates, budget, head_dim**-0.5


def expected(paged, kv_scales, query, items, units, gates, budget, scale):
    """Outputs in float64 and in plain torch at the query's precision; NaN for padding."""
    exact = torch.full(query.shape, NAN, dtype=torch.float64)
    decode_reference.decode(
        query.double(), paged.kv_cache, paged.block_table, *items, units, gates, budget, scale,
        exact, kv_scales,
    )  # fmt: skip
    eager = torch.full_like(query, NAN)
    for item, (row, position) in enumerate(zip(*(i.tolist() for i in items), strict=True)):
        if row >= 0:
            eager[item] = eager_one(
                query[item], paged.kv_cache, paged.block_table[row], position, units[item],
                None if gates is None else gates[item], budget, scale, kv_scales,
            )  # fmt: skip
    return exact, eager


def on(device, *values):
    """Tensors, tuples of tensors and None on ``device``."""
    return [
        v if v is None else tuple(on(device, *v)) if isinstance(v, tuple) else v.to(device)
        for v in values
    ]


def decode(device, paged, kv_scales, query, items, units, gates, budget, scale, impl="triton"):
    paged = paged.to(device)
    query, items, units, gates, kv_scales = on(device, query, items, units, gates, kv_scales)
    out = torch.full_like(query, NAN)
    decode_api.decode(
        query, paged.kv_cache, paged.block_table, *items, units, gates, budget, scale, out,
        kv_scales=kv_scales, impl=impl,
    )  # fmt: skip
    return out.cpu()


def prefill(device, paged, kv_scales, query, items, units, gates, budget, scale, impl="triton"):
    """The same with one query an item."""
    paged = paged.to(device)
    query, items, units, gates, kv_scales = on(device, query, items, units, gates, kv_scales)
    start = torch.arange(len(query), dtype=torch.int32, device=device)
    out = torch.full_like(query, NAN)
    prefill_api.prefill(
        query, *paged.kv_cache.chunk(2, dim=-1), paged.block_table, *items, start,
        torch.ones_like(start), units, gates, budget, scale, out, kv_scales=kv_scales, impl=impl,
    )  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize("attend", [decode, prefill])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_as_exact_as_over_a_cache_without_quantisation(case, attend, device):
    arguments = problem(case)
    exact, eager = expected(*arguments)
    real = arguments[3][0] >= 0
    for impl in implementations(device):
        out = attend(device, *arguments, impl=impl)
        assert out[~real].isnan().all(), impl
        assert_within_twice(out[real], eager[real], exact[real], EPS[out.dtype])


def test_a_chunk_that_shares_a_selection_is_exact_at_every_query(device):
    heads, group, head_dim, first, tokens = 2, 3, 128, 200, 50
    budget, scale = Budget(32, 33, 5, 64), head_dim**-0.5
    paged, kv_scales = quantised(build([first + tokens], heads, head_dim, 16))
    shape = (tokens, heads * group, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(BF16)
    row, position = items_of([(0, first)])
    units, _ = chosen(paged, row, position, budget)
    each = items_of([(0, first + i) for i in range(tokens)])
    exact, eager = expected(
        paged, kv_scales, query, each, units.expand(tokens, -1, -1), None, budget, scale
    )
    start, length = torch.zeros_like(row), torch.full_like(row, tokens)
    for impl in implementations(device):
        there = paged.to(device)
        out = torch.full_like(query, NAN, device=device)
        prefill_api.prefill(
            query.to(device), *there.kv_cache.chunk(2, dim=-1), there.block_table,
            *on(device, row, position, start, length, units), None, budget, scale, out,
            kv_scales=tuple(on(device, *kv_scales)), impl=impl,
        )  # fmt: skip
        assert_within_twice(out, eager, exact, EPS[BF16])


@pytest.mark.parametrize("attend", [decode, prefill])
def test_while_everything_fits_it_is_ordinary_attention_over_dequantised_tokens(attend, device):
    paged, *rest = problem(CASES["all-fits"])
    query, items, scale = rest[1], rest[2], rest[-1]
    for impl in implementations(device):
        out = attend(device, paged, *rest, impl=impl)
        for item in (1, 2):
            row = int(items[0][item])
            q = query[item].double().view(2, 3, -1)
            logits = torch.einsum("hgd,nhd->hgn", q, paged.key[row]) * scale
            dense = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), paged.value[row])
            torch.testing.assert_close(
                out[item].double(), dense.flatten(0, 1), rtol=0, atol=5e-6, msg=impl
            )


def test_keydiff_scores_what_the_cache_holds_whatever_its_scale(device):
    lengths, heads, head_dim, page = [63, 111], 2, 80, 16
    paged, _ = quantised(build(lengths, heads, head_dim, page))
    start, ends = torch.tensor([0, 63, 174]).int(), torch.tensor(lengths).int()
    blocks = paged.kv_cache.shape[0]

    def scored(kv_cache, impl):
        where = kv_cache.device
        scores = paged_view(blocks, heads, page, 1, F32, where)[..., 0]
        anchors = paged_view(blocks, heads, page, head_dim, F32, where)[:, :, 0]
        table, first, last = on(where, paged.block_table, start, ends)
        score_api.keydiff(kv_cache, table, first, last, scores, anchors, impl=impl)
        return scores.cpu(), anchors.cpu()

    dequantised = paged.kv_cache.float() * SCALES[0]
    wanted = scored(dequantised, "reference")
    assert wanted[0].isfinite().sum() == sum(lengths) * heads
    for impl in implementations(device):
        for got, want in zip(scored(paged.to(device).kv_cache, impl), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6, equal_nan=True, msg=impl)


def test_bounds_are_kept_before_the_scale_and_choose_as_dequantised_ones(device):
    lengths, heads, head_dim, page, unit = [400, 130], 2, 64, 32, 16
    paged = build(lengths, heads, head_dim, page)
    # small whole numbers times a power of two: sums are exact, so ties are ties
    paged.kv_cache.copy_((paged.kv_cache * 2).round().clamp(-4, 4) * 0.125)
    paged, _ = quantised(paged, (0.125, 1.0))
    mapping = torch.cat(
        [slots(paged.block_table, r, torch.arange(n), page) for r, n in enumerate(lengths)]
    )
    shape = (paged.kv_cache.shape[0], heads, page // unit, 2, head_dim)
    budget = Budget(64, 16, 4, 1, unit)
    row, position = items_of([(0, 399), (1, 129), (-1, 0), (0, 200)])
    generator = torch.Generator().manual_seed(2)
    query = torch.randint(-1, 2, (4, 3 * heads, head_dim), generator=generator).to(F16)
    query[..., 3:] = 0

    plain = torch.full(shape, NAN)
    bounds_reference.write_bounds(paged.kv_cache.float() * 0.125, mapping, plain)
    wanted = bounds_reference.select_by_query(
        query, plain, paged.block_table, row, position, budget, 5
    )
    assert (wanted[0] >= 0).sum() == 4 * heads
    for impl in implementations(device):
        there = paged.to(device)
        bounds = torch.full(shape, NAN).to(FP8).to(device)
        bounds_api.write_bounds(there.kv_cache, mapping.to(device), bounds, impl=impl)
        written = plain.isfinite()
        assert torch.equal(bounds.cpu().float()[written] * 0.125, plain[written]), impl
        units = torch.full(wanted.shape, 77, dtype=torch.int32, device=device)
        bounds_api.select_by_query(
            query.to(device), bounds, there.block_table, *on(device, row, position), budget, units,
            impl=impl,
        )  # fmt: skip
        assert torch.equal(units.cpu(), wanted), impl


WRONG_SCALES = {
    "missing": (lambda _: None, ValueError, "kv_scales are missing"),
    "of-another-dtype": (lambda s: (s[0].half(), s[1]), TypeError, "kv_scales k_scale"),
    "one-a-head": (lambda s: (s[0], s[1].expand(2)), ValueError, r"kv_scales v_scale .*\(2,\)"),
}


@pytest.mark.parametrize("attend", [decode, prefill])
@pytest.mark.parametrize("wrong", WRONG_SCALES.values(), ids=WRONG_SCALES.keys())
def test_scales_that_do_not_fit_are_refused_by_name(wrong, attend, device):
    change, error, message = wrong
    paged, kv_scales, *rest = problem(CASES["d64-g4-token"])
    with pytest.raises(error, match=message):
        attend(device, paged, change(kv_scales), *rest)


@pytest.mark.parametrize("attend", [decode, prefill])
def test_scales_beside_a_cache_that_is_not_quantised_are_refused(attend, device):
    _, kv_scales, *rest = problem(CASES["d64-g4-token"])
    paged = build([1, 63, 300], 2, 64, 16)
    with pytest.raises(ValueError, match="kv_scales are given"):
        attend(device, paged, kv_scales, *rest)


@pytest.mark.parametrize(("capability", "takes"), [(80, False), (86, False), (89, True)])
def test_gpus_before_8_9_are_told_that_they_lack_fp8(monkeypatch, capability, takes):
    monkeypatch.setattr(validate, "compute_capability", lambda device: capability)
    query = SimpleNamespace(
        shape=(1, 4, 64), dtype=F16, is_cuda=True, device=torch.device("cuda", 0)
    )
    ok, reason = validate.kernel_takes(query, SimpleNamespace(dtype=FP8))
    assert ok == takes
    assert takes or "compute capability 8.9" in reason
    assert validate.kernel_takes(query, SimpleNamespace(dtype=F16)) == (True, "")


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scales(device):
    paged, kv_scales, query, items, units, _, budget, scale = problem(CASES["d128-g3-bf16"])
    paged = paged.to(device)
    query, items, units, kv_scales = on(device, query, items, units, kv_scales)
    bound = budget.max_tokens_attended(4096)
    workspace = tuple(
        torch.full(shape, NAN, device=device)
        for shape in decode_api.workspace_shapes(*query.shape, bound)
    )
    out = torch.full_like(query, NAN)

    def step():
        decode_api.decode(
            query, paged.kv_cache, paged.block_table, *items, units, None, budget, scale, out,
            workspace, bound, kv_scales,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    before = out.clone()
    kv_scales[0].mul_(0.5)
    kv_scales[1].mul_(3)
    graph.replay()
    replayed = out.clone()
    step()
    torch.testing.assert_close(out, replayed, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(replayed[1:], before[1:])
