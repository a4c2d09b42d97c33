"""Decode and prefill by FlashAttention-3 over page tables, against float64.

On a GPU that has it, this is vLLM's FlashAttention-3. Elsewhere plain torch stands in, which
does what that one does with the same arguments: what is tested there is what we hand to it.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import test_decode
import test_fp8
import test_prefill
import torch
from caches import EPS, NAN, assert_within_twice, build, chosen, items_of, quantised
from flash_attention import flash_attn_varlen_func
from interpreter import BF16, BITWISE

from vllm_sparsek import attention_forward, compat
from vllm_sparsek.kernels.common import engines, page_tables
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.decode.reference import visible_positions
from vllm_sparsek.kernels.prefill import api as prefill_api

F16, F32 = torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
CUDA = torch.device("cuda", 0)
BUDGET = Budget(k=16, window=8, sinks=2, refresh=16)


@pytest.fixture(autouse=True)
def fa3(device, monkeypatch):
    """FlashAttention-3, or what stands in for it."""
    if device.type != "cuda":
        monkeypatch.setattr(compat, "flash_attention_3", lambda: (flash_attn_varlen_func, ""))
        return
    function, reason = compat.flash_attention_3()
    if function is None:
        pytest.skip(reason)


def hard(cases):
    """The cases of Triton's tests in 16 bits, and without gates."""
    return {
        name.removesuffix("-soft"): (F16 if dtype == F32 else dtype, *rest, False)
        for name, (dtype, *rest, _) in cases.items()
    }


DECODE = hard(test_decode.CASES)
PREFILL = {
    **hard(test_prefill.CASES),
    "r1-g2": (F16, 2, 2, 64, 16, [(0, 0, 5), (1, 90, 6)], Budget(16, 8, 4, 1), False),
    "r128-mha-of-few-tokens": (BF16, 3, 1, 64, 16, [(0, 250, 9)], Budget(32, 8, 4, 128), False),
    "r64-unit-of-two-pages": (F16, 1, 2, 64, 16, [(0, 120, 30)], Budget(64, 9, 3, 64, 32), False),
    "r64-unit-of-half-a-page": (F16, 2, 2, 64, 32, [(0, 120, 30)], Budget(64, 9, 3, 64, 16), False),
}


@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE.keys())
def test_decode_is_as_exact_as_low_precision_attention(case, device):
    test_decode.hold_to_float64(case, device, ["fa3"])


@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL.keys())
def test_prefill_is_as_exact_as_low_precision_attention(case, device):
    test_prefill.hold_to_float64(case, device, ["fa3"])


def test_the_table_of_a_list_names_the_places_of_its_tokens(device):
    heads, page, budget = 2, 16, Budget(k=24, window=10, sinks=3, refresh=16)
    paged = build([150], heads, 64, page, F16)
    units, _ = chosen(paged, *items_of([(0, 130), (-1, 0)]), budget)
    row, position = items_of([(0, 130), (-1, 0)])
    query_len = torch.tensor([9, 1], dtype=torch.int32)
    there = paged.to(device)
    key_cache = there.kv_cache.chunk(2, dim=-1)[0]
    tables = page_tables.make_tables(
        key_cache, there.block_table, row.to(device), position.to(device), query_len.to(device),
        units.to(device), budget, 16,
    )  # fmt: skip
    assert tables.lengths.tolist() == [3 + 24 + 20, 0] * heads
    assert tables.starts.tolist() == [0, 16, 32, 48, 64]
    pages = page_tables.pages_of(key_cache, tables.step).cpu()
    for head in range(heads):
        seen = [0, 1, 2, *units[0, head].tolist(), *range(119, 139)]
        listed = pages[tables.table[head * 2, : len(seen)].long().cpu(), 0, 0]
        expected = paged.key[0][seen, head]
        assert torch.equal(listed.double(), expected)


LAYOUTS = {
    # sizes and strides of [num_blocks, H, page, 8], elements between pages of one token
    "packed": ((5, 3, 16, 8), (768, 256, 16, 1), 16),
    "several layers share a block": ((5, 3, 16, 8), (2304, 256, 16, 1), 16),
    "heads inside tokens": ((2, 3, 50, 8), (1200, 8, 24, 1), 8),
    "one block": ((1, 3, 50, 8), (7, 400, 8, 1), 8),
    "one token": ((1, 1, 1, 8), (7, 5, 3, 1), 8),
}


@pytest.mark.parametrize(("sizes", "strides", "apart"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_token_of_a_cache_of_any_strides_is_on_a_page(sizes, strides, apart):
    cache = torch.arange(20000).half().as_strided(sizes, strides)
    for step in (1, 2) if sizes[2] % 2 == 0 else (1,):
        found, (block, head, page), count = page_tables.page_strides(cache, step)
        assert step > 1 or found == apart
        pages = page_tables.pages_of(cache, step)
        assert pages.shape == (count, step, 1, 8)
        for b, h, t in itertools.product(*(range(n) for n in sizes[:3])):
            i = b * block + h * head + t // step * page
            assert torch.equal(pages[i, t % step, 0], cache[b, h, t])


@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_outputs_are_the_same_however_a_prompt_is_chunked(unit, device):
    n, budget = 150, Budget(k=32, window=11, sinks=3, refresh=64, unit=unit)
    paged = build([n], 2, 64, 16, BF16)
    query = torch.randn(n, 6, 64, generator=torch.Generator().manual_seed(9)).to(BF16)
    results = []
    for cuts in ([0, 150], [0, 1, 70, 77, 128, 150], [0, 64, 149, 150]):
        out = torch.full_like(query, NAN)
        for first, stop in itertools.pairwise(cuts):
            *items, _ = test_prefill.split_items([(0, first, stop - first)], budget.refresh)
            units, _ = chosen(paged, items[0], items[1], budget)
            out[first:stop] = test_prefill.attend(
                paged.to(device), query[first:stop], items, units, None, budget, 0.125, "fa3"
            )
        results.append(out)
    assert not results[0].isnan().any()
    for result in results[1:]:
        # the stand-in's matrix products round by their shapes, to the last bit of float16
        torch.testing.assert_close(result, results[0], rtol=0, atol=500 * BITWISE)


def test_decode_does_not_depend_on_the_rest_of_the_batch(device):
    paged, query, row, position, units, _, budget, scale = test_decode.problem(
        DECODE["d64-g4-token"]
    )
    there = paged.to(device)
    arguments = (query, row, position, units)
    together = test_decode.attend(there, *arguments, None, budget, scale, "fa3")
    for i in range(1, row.numel() - 1):
        alone = (a[i : i + 1] for a in arguments)
        found = test_decode.attend(there, *alone, None, budget, scale, "fa3")
        assert torch.equal(found[0], together[i])


def test_items_may_own_any_rows_of_the_batch(device):
    paged, query, items, units, _, budget, scale = test_prefill.problem(PREFILL["r16-token"])
    there = paged.to(device)
    expected = test_prefill.attend(there, query, items, units, None, budget, scale, "fa3")
    order = torch.randperm(items[0].numel(), generator=torch.Generator().manual_seed(2))
    shuffled = test_prefill.attend(
        there, query, [i[order] for i in items], units[order], None, budget, scale, "fa3"
    )
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=0, equal_nan=True)


def test_strided_queries_and_outputs_are_read_and_written_by_stride(device):
    paged, query, row, position, units, _, budget, scale = test_decode.problem(DECODE["d96-g1-mha"])
    there = paged.to(device)
    arguments = (row, position, units, None, budget, scale)
    expected = test_decode.attend(there, query, *arguments, "fa3")
    wide = torch.full((query.shape[0], 5, *query.shape[1:]), NAN, dtype=query.dtype, device=device)
    wide[:, 1] = query.to(device)
    decode_api.decode(
        wide[:, 1], there.kv_cache, there.block_table, row.to(device), position.to(device),
        units.to(device), None, budget, scale, wide[:, 3], impl="fa3",
    )  # fmt: skip
    torch.testing.assert_close(wide[:, 3].cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert wide[:, [0, 2, 4]].isnan().all()


@pytest.mark.parametrize("heads_inside", [False, True], ids=["[B, H, S, D]", "[B, S, H, D]"])
@pytest.mark.parametrize("granularity", ["token", "page"])
def test_the_dense_layout_runs_on_it(heads_inside, granularity, device):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, n, heads, 64, generator=generator).half().transpose(1, 2)
        for n, heads in ((70, 6), (203, 2), (203, 2))
    )
    scores = torch.randn(2, 2, 203, generator=generator)
    settings = {"k": 32, "window": 9, "sinks": 3, "granularity": granularity}
    expected = attention_forward(
        *(t.float() for t in (q, k, v)), scores=scores, config=settings, impl="cpu"
    )
    if not heads_inside:
        q, k, v = (t.contiguous() for t in (q, k, v))
    out = attention_forward(
        *(t.to(device) for t in (q, k, v)), scores=scores.to(device), config=settings, impl="fa3"
    )
    torch.testing.assert_close(out.cpu().float(), expected, rtol=0, atol=4e-3)


def test_a_batch_without_items_is_no_error(device):
    paged = build([40], 2, 64, 16, F16).to(device)
    query = torch.empty(0, 4, 64, dtype=F16, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    units = torch.empty(0, 2, 16, dtype=torch.int32, device=device)
    budget = Budget(k=16, window=8, sinks=2, refresh=16)
    decode_api.decode(
        query, paged.kv_cache, paged.block_table, none, none, units, None, budget, 1.0, query,
        impl="fa3",
    )  # fmt: skip
    prefill_api.prefill(
        query, *paged.kv_cache.chunk(2, dim=-1), paged.block_table, none, none, none, none, units,
        None, budget, 1.0, query, impl="fa3",
    )  # fmt: skip


FP8_CASES = {
    # dtype of queries, KV heads, G, D, page, requests, budget
    "bf16": (BF16, 2, 3, 128, 16, [250, 100], Budget(32, 33, 5, 64)),
    "fp16-mha-page": (F16, 2, 1, 64, 32, [200], Budget(64, 20, 4, 16, unit=32)),
    "heads": (BF16, 2, 2, 64, 16, [180], Budget(1, 8, 4, 16).with_heads([(60, None), (16, None)])),
}


@pytest.mark.parametrize("case", FP8_CASES.values(), ids=FP8_CASES.keys())
def test_products_of_an_fp8_cache_are_as_exact_as_fp8_operands(case, device):
    dtype, heads, group, head_dim, page, lengths, budget = case
    # the interpreter loses carries when it rounds to fp8: queries that need no rounding
    paged, kv_scales = quantised(build(lengths, heads, head_dim, page))
    scale, tokens = head_dim**-0.5, 40
    chunks = [(row, n - tokens, tokens) for row, n in enumerate(lengths)]
    shape = (len(chunks) * tokens, heads * group, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    query = (query.to(FP8).float() if device.type != "cuda" else query).to(dtype)
    *items, _ = test_prefill.split_items(chunks, budget.refresh)
    row, position, start, length = items
    units, _ = chosen(paged, row, position, budget)
    there = paged.to(device)
    out = torch.full_like(query, NAN, device=device)
    prefill_api.prefill(
        query.to(device), *there.kv_cache.chunk(2, dim=-1), there.block_table,
        *(i.to(device) for i in items), units.to(device), None, budget, scale, out,
        kv_scales=tuple(s.to(device) for s in kv_scales), impl="fa3",
    )  # fmt: skip
    of_item = torch.arange(row.numel()).repeat_interleave(length.long())
    at = position[of_item] + torch.arange(len(query)).int() - start[of_item]
    each = paged, kv_scales, query, (row[of_item], at), units[of_item], None, budget, scale
    exact, _ = test_fp8.expected(*each)
    assert_within_twice(out, fp8_operands(*each), exact, EPS[BF16])


def fp8_operands(paged, kv_scales, query, items, units, gates, budget, scale):
    """Attention in plain torch with queries, keys, values and probabilities in fp8."""
    heads, page = paged.kv_cache.shape[1:3]
    out = torch.empty_like(query, dtype=F32)
    for i, (row, position) in enumerate(zip(*(x.tolist() for x in items), strict=True)):
        by_head = zip(query[i].view(heads, -1, query.shape[2]), out[i].chunk(heads), strict=True)
        for head, (q, found) in enumerate(by_head):
            kept = units[i, head]
            at = visible_positions(position, kept[kept >= 0], budget)
            blocks = paged.block_table[row, at // page].long()
            key, value = paged.kv_cache[blocks, head, at % page].float().chunk(2, dim=-1)
            logits = q.to(FP8).float() @ key.T * kv_scales[0] * scale
            p = (logits - logits.amax(-1, keepdim=True)).exp()
            found.copy_(p.to(FP8).float() @ value * kv_scales[1] / p.sum(-1, keepdim=True))
    return out


# what does not fit


def call(**changes):
    """Arguments of ``fits`` that fit, but for ``changes``."""
    cache = torch.zeros(4, 2, 16, 128, dtype=changes.pop("dtype", F16))
    key, value = cache.chunk(2, dim=-1)
    given = {
        "query": key[:1, :1, 0], "key_cache": key, "value_cache": value, "gates": None,
        "budget": BUDGET,
    }  # fmt: skip
    return given | changes


SHIFTED = torch.zeros(4 * 2 * 16 * 128 + 1, dtype=F16)[1:].view(4, 2, 16, 128)
MISFITS = {
    "float32": (call(dtype=F32), "query is torch.float32"),
    "another dtype": (call(key_cache=torch.zeros(4, 2, 16, 64)), "one of the query's dtype"),
    "soft_v": (call(gates=torch.ones(1, 2, 16)), "weighs no values"),
    "head size": (call(query=torch.zeros(1, 2, 512, dtype=F16)), "head_dim is 512"),
    "too many pages": (
        call(key_cache=torch.empty((1 << 23, 16, 16, 64), dtype=F16, device="meta")), "int32",
    ),
    "an odd head size": (call(query=torch.zeros(1, 2, 60, dtype=F16)), "head_dim is 60"),
    "alignment": (call(key_cache=SHIFTED[..., :64]), "key_cache: tokens must lie"),
    "values elsewhere": (
        call(value_cache=torch.zeros(4, 16, 2, 64, dtype=F16).transpose(1, 2)), "do not lie alike",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_named(arguments, reason):
    assert page_tables.fits(**call()) == (True, "")
    ok, found = page_tables.fits(**arguments)
    assert not ok
    assert reason in found


def test_decode_leaves_fp8_caches_to_triton():
    from vllm_sparsek.kernels.decode import fa3

    key, value = torch.zeros(4, 2, 16, 128).to(FP8).chunk(2, dim=-1)
    given = call(key_cache=key, value_cache=value)
    assert page_tables.fits(**given) == (True, "")
    ok, reason = fa3.fits(**given)
    assert not ok
    assert "decode's queries would be rounded" in reason


def test_asking_for_it_where_it_does_not_fit_is_one_error(device):
    paged, query, row, position, units, gates, budget, scale = test_decode.problem(
        test_decode.CASES["d80-g7-fp16-soft"]
    )
    arguments = (paged.to(device), query, row, position, units, gates, budget, scale)
    with pytest.raises(ValueError, match="decode: impl 'fa3' does not fit: gates are given"):
        test_decode.attend(*arguments, "fa3")


def test_without_the_library_the_reason_is_its_own(monkeypatch, device):
    monkeypatch.setattr(compat, "flash_attention_3", lambda: (None, "no such wheel"))
    paged, query, row, position, units, _, budget, scale = test_decode.problem(
        DECODE["d64-g4-token"]
    )
    arguments = (paged.to(device), query, row, position, units, None, budget, scale)
    with pytest.raises(ValueError, match="no such wheel"):
        test_decode.attend(*arguments, "fa3")


# which engine


def test_shipped_tables_are_valid_and_an_unmeasured_gpu_has_none():
    from importlib.resources import files

    shipped = [f.name for f in files("vllm_sparsek.configs").joinpath("engines").iterdir()]
    capabilities = [int(name[3:-5]) for name in shipped if name.endswith(".yaml")]
    assert 90 in capabilities
    for capability in capabilities:
        engines.table_of(capability)
    assert engines.table_of(80) == ()
    assert engines.engines_of(80, "prefill", 1, 128, 512) == ("triton",)


def test_rules_that_hold_are_tried_in_order_up_to_triton(monkeypatch):
    table = """
rules:
  - {operation: prefill, granularity: page, engine: triton}
  - {operation: prefill, rows_at_least: 64, head_dims: [64, 128], engine: hopper}
  - {operation: prefill, rows_at_least: 64, engine: fa3}
"""
    monkeypatch.setattr(engines, "table_of", lambda _: engines.parse(table, "t"))
    engines.engines_of.cache_clear()
    asked = {
        ("prefill", 1, 128, 64): ("hopper", "fa3", "triton"),
        ("prefill", 1, 64, 999): ("hopper", "fa3", "triton"),
        ("prefill", 1, 256, 64): ("fa3", "triton"),
        ("prefill", 1, 128, 63): ("triton",),
        ("prefill", 16, 128, 64): ("triton",),
        ("decode", 1, 128, 64): ("triton",),
    }
    found = {what: engines.engines_of(90, *what) for what in asked}
    engines.engines_of.cache_clear()
    assert found == asked


FAULTS = {
    "nothing": ("", "must have the key `rules`"),
    "no list": ("rules:", "must have the key `rules`, a list"),
    "another key": ("rules: []\nrule: 1", "must have the key `rules`"),
    "unknown field": (
        "rules: [{operation: decode, engine: fa3, batch: 3}]", "t: rule 1: .*'batch'",
    ),
    "missing field": ("rules: [{operation: decode}]", "t: rule 1: .*'engine'"),
    "no mapping": ("rules: [fa3]", "t: rule 1"),
    "operation": ("rules: [{operation: select, engine: fa3}]", "operation must be one of"),
    "engine": ("rules: [{operation: decode, engine: fa4}]", "engine must be one of"),
    "engine of another operation": (
        "rules: [{operation: decode, engine: hopper}]", "engine must be one of",
    ),
    "granularity": (
        "rules: [{operation: decode, engine: fa3, granularity: word}]", "granularity must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_table_names_the_fault(text, message):
    with pytest.raises(ValueError, match=message):
        engines.parse(text, "t")


def chosen_module(monkeypatch, impl, says, unfit=(), missing=()):
    """Name of the module that prefills on a GPU whose table ``says`` engines."""
    modules = {
        name: SimpleNamespace(
            __name__=name, fits=lambda *_, n=name: (n not in unfit, "too odd" if n in unfit else "")
        )
        for name in ("triton", "fa3", "hopper")
    }

    def load(operation, name, device):
        if name in missing:
            raise ImportError(f"no {name} here")
        return modules[name]

    monkeypatch.setattr(engines, "compute_capability", lambda device: 90)
    monkeypatch.setattr(engines, "engines_of", lambda *_: says)
    monkeypatch.setattr(engines, "implementation", load)
    query = SimpleNamespace(shape=(1, 4, 64), device=CUDA)
    return engines.attention_module("prefill", impl, query, 2, None, None, None, BUDGET).__name__


ALL = ("hopper", "fa3", "triton")


def test_auto_follows_the_table_and_a_name_does_not(monkeypatch):
    assert chosen_module(monkeypatch, "auto", ("triton",)) == "triton"
    assert chosen_module(monkeypatch, "auto", ALL) == "hopper"
    assert chosen_module(monkeypatch, "auto", ALL, unfit=("hopper",)) == "fa3"
    assert chosen_module(monkeypatch, "triton", ALL) == "triton"
    assert chosen_module(monkeypatch, "fa3", ("triton",)) == "fa3"


def test_auto_passes_over_what_cannot_and_logs_the_reason_once(monkeypatch, caplog):
    caplog.set_level("INFO", engines.__name__)
    for _ in range(3):
        found = chosen_module(monkeypatch, "auto", ALL, unfit=("fa3",), missing=("hopper",))
        assert found == "triton"
    expected = "sparsek prefill passes over fa3, which the table says: too odd"
    assert caplog.text.count(expected) == 1
    assert caplog.text.count("passes over hopper, which the table says: no hopper here") == 1


def test_an_engine_asked_for_that_cannot_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="prefill: impl 'hopper' does not fit: too odd"):
        chosen_module(monkeypatch, "hopper", ALL, unfit=("hopper",))
    with pytest.raises(RuntimeError, match="impl 'hopper' cannot be loaded: no hopper here"):
        chosen_module(monkeypatch, "hopper", ALL, missing=("hopper",))


def test_other_operations_have_no_such_implementation():
    from vllm_sparsek.kernels.common import dispatch

    with pytest.raises(ValueError, match="select: impl must be auto or one of"):
        dispatch.implementation("select", "fa3", CUDA)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_the_benchmark_times_engines_whose_results_are_right(kind, unit, device):
    from vllm_sparsek.serving_bench.kernel_bench.arms import ARMS
    from vllm_sparsek.serving_bench.kernel_bench.cases import Case
    from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
    from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs

    budget = Budget(k=32, window=24, sinks=3, refresh=32, unit=unit)
    case = Case(
        "tiny", "engines", kind, batch=2, context=120, queries=1 if kind == "decode" else 50,
        query_heads=4, kv_heads=2, head_dim=64, dtype="float16", page=16, budgets=(budget,),
    )  # fmt: skip
    inputs = Inputs(case, device)
    by_name = {arm.name: arm for arm in ARMS}
    for name in ("sparsek-fa3", "sparsek-triton"):
        assert by_name[name].unavailable(case, budget) == ""
        prepared = by_name[name].prepare(inputs, Gate(inputs), budget)
        verdict = prepared.judge(prepared.calls[0]())
        assert verdict.ok, (name, verdict)


# what only a GPU shows


@pytest.mark.gpu
def test_decode_replays_in_a_cuda_graph(device):
    case = (BF16, 2, 4, 128, 16, [1, 300, 1000], Budget(64, 16, 4, 16), False)
    paged, query, row, position, units, _, budget, scale = test_decode.problem(case)
    paged, query, units = paged.to(device), query.to(device), units.to(device)
    row, position = row.to(device), position.to(device)
    out = torch.empty_like(query)

    def step():
        decode_api.decode(
            query, paged.kv_cache, paged.block_table, row, position, units, None, budget, scale,
            out, impl="fa3",
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # another step of the same shapes: rows change places, positions move, one row is padding
    rows, positions = torch.tensor([2, -1, 1, 0, 1]).int(), torch.tensor([999, 0, 250, 0, 299])
    moved, _ = chosen(paged.to("cpu"), rows, positions.int(), budget)
    units.fill_(-1)[..., : moved.shape[-1]].copy_(moved)
    row.copy_(rows)
    position.copy_(positions)
    out.fill_(NAN)
    graph.replay()
    replayed = out.clone()
    out.fill_(NAN)
    step()
    torch.testing.assert_close(out, replayed, rtol=0, atol=0, equal_nan=True)
    assert not out[[0, 2, 3, 4]].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [1, 16], ids=["token", "page"])
def test_blocks_beyond_two_to_the_31_elements_are_found(unit, device):
    case = (BF16, 2, 4, 128, 16, [(0, 200, 100)], Budget(64, 16, 4, 64, unit), False)
    paged, query, items, units, _, budget, scale = test_prefill.problem(case)
    arguments = (query, items, units, None, budget, scale, "fa3")
    expected = test_prefill.attend(paged.to(device), *arguments)
    used, heads, page, width = paged.kv_cache.shape
    stride = (1 << 31) // (used - 2) // (page * width) * page * width
    storage = torch.empty(stride * used, dtype=BF16, device=device)
    strides = (stride, page * width, width, 1)
    far = storage.as_strided((used, heads, page, width), strides).copy_(paged.kv_cache)
    paged = paged.to(device)
    paged.kv_cache = far
    out = test_prefill.attend(paged, *arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
