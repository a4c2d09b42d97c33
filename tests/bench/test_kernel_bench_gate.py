"""What judges the kernel benchmark's results, and the arms that are judged."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from flash_attention import flash_attn_varlen_func
from kernel_cases import (
    CHUNK,
    CPU,
    DECODE,
    FP8_CHUNK,
    FP8_DECODE,
    PAGES,
    PREFILL,
    SCORE,
    TOKENS,
    call_once,
    row,
)

from vllm_sparsek import compat
from vllm_sparsek.kernels.decode import reference as decode_reference
from vllm_sparsek.serving_bench.kernel_bench import cases, gate, measure
from vllm_sparsek.serving_bench.kernel_bench.arms import ARMS, arms_of, kv_write, sdpa, sparsek
from vllm_sparsek.serving_bench.kernel_bench.arms.base import import_fault
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs
from vllm_sparsek.serving_bench.kernel_bench.run import run_arm

# the gate


def judged(arm_name, case, budget=None):
    """Inputs, gate, and what the arm made of them."""
    inputs = Inputs(case, CPU)
    judges = gate.Gate(inputs)
    arm = next(arm for arm in ARMS if arm.name == arm_name)
    prepared = arm.prepare(inputs, judges, budget)
    return inputs, prepared, prepared.calls[0]()


@pytest.mark.parametrize("budget", [TOKENS, PAGES], ids=["tokens", "pages"])
@pytest.mark.parametrize("case", [DECODE, PREFILL, CHUNK], ids=["decode", "prefill", "chunk"])
@pytest.mark.parametrize("arm", ["sparsek", "sparsek-attend"])
def test_the_gate_is_green_for_our_attention(arm, case, budget):
    _, prepared, output = judged(arm, case, budget)
    verdict = prepared.judge(output)
    assert verdict.ok, verdict
    assert 0 < verdict.error_share < 1
    assert 0 < verdict.max_diff < gate.USER_BOUND["float16"]


@pytest.mark.parametrize("budget", [TOKENS, PAGES], ids=["tokens", "pages"])
@pytest.mark.parametrize("case", [FP8_DECODE, FP8_CHUNK], ids=["decode", "chunk"])
@pytest.mark.parametrize("arm", ["sparsek", "sparsek-attend", "sparsek-select"])
def test_the_gate_is_green_for_ours_over_an_fp8_cache(arm, case, budget):
    _, prepared, output = judged(arm, case, budget)
    verdict = prepared.judge(output)
    assert verdict.ok, verdict
    if arm != "sparsek-select":
        assert 0 < verdict.error_share < 1
        assert 0 < verdict.max_diff < gate.USER_BOUND["float16"]


WRONG_SCALES = {
    "swapped": lambda k, v: (v, k),
    "ignored": lambda k, v: (k / k, v / v),
    "of keys ignored": lambda k, v: (k / k, v),
    "of values ignored": lambda k, v: (k, v / v),
    "two percent off": lambda k, v: (k, v * 1.02),
}


@pytest.mark.parametrize("wrong", WRONG_SCALES.values(), ids=WRONG_SCALES.keys())
@pytest.mark.parametrize("case", [FP8_DECODE, FP8_CHUNK], ids=["decode", "chunk"])
def test_the_gate_refuses_wrong_scales(case, wrong):
    inputs, prepared, output = judged("sparsek-attend", case, TOKENS)
    assert prepared.judge(output).ok
    inputs.kv_scales = wrong(*inputs.kv_scales)
    arm = next(found for found in ARMS if found.name == "sparsek-attend")
    again = arm.prepare(inputs, gate.Gate(inputs), TOKENS).calls[0]()
    # the earlier gate knows the scales
    assert not prepared.judge(again).ok


@pytest.mark.parametrize("fp8_products", [False, True], ids=["16 bits", "fp8"])
def test_what_is_expected_over_an_fp8_cache_is_the_references_attention(fp8_products):
    inputs = Inputs(FP8_DECODE, CPU)
    expected = gate.expect_sparse(inputs, TOKENS, fp8_products)
    items, query = inputs.items(TOKENS.refresh, 0), inputs.query[0].double()
    wanted = torch.full_like(query, float("nan"))
    decode_reference.decode(
        query, inputs.kv_cache, inputs.table, items.row, items.position, inputs.units(TOKENS, 0),
        None, TOKENS, inputs.scale, wanted, inputs.kv_scales,
    )  # fmt: skip
    wanted = torch.stack([wanted[at.row, at.head] for at in expected.samples])
    torch.testing.assert_close(expected.exact, wanted, rtol=0, atol=1e-12)


def test_fp8_products_round_queries_and_probabilities():
    # keys 0 and 1 of two tokens, values 0 and 1; the second one's probability is 0.9 of the first's
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).to(torch.float8_e4m3fn)
    k_scale, v_scale = torch.tensor(0.5), torch.tensor(0.25)
    found = gate._attend_in_fp8(torch.tensor([1.05]), rows, 2 * math.log(0.9), (k_scale, v_scale))
    # 1.05 becomes 1, and 0.9 becomes 0.875 above the line only
    assert found.item() == pytest.approx(0.875 * 0.25 / 1.9)


class NotingGate(gate.Gate):
    """Notes whom it excuses."""

    def sparse(self, budget, fp8_products=False):
        self.excused = fp8_products
        return super().sparse(budget, fp8_products)


def test_only_engines_that_multiply_in_fp8_may_be_wrong_by_its_rounding(monkeypatch):
    inputs = Inputs(FP8_CHUNK, CPU)
    strict, loose = (gate.expect_sparse(inputs, TOKENS, fp8) for fp8 in (False, True))
    # three bits behind the point, not ten; an output may still not be off by a third of its size
    relative = [(e.allowed / e.exact.abs().amax(1)).max().item() for e in (strict, loose)]
    assert relative[0] < 0.005 < 0.02 < relative[1] < 1 / 3
    for engine, wanted in (("triton", False), ("hopper", False), ("fa3", True)):
        seen = []

        def chosen(*arguments, engine=engine, seen=seen):
            seen.append(arguments)
            return types.SimpleNamespace(__name__=f"vllm_sparsek.kernels.prefill.{engine}")

        monkeypatch.setattr(sparsek, "attention_module", chosen)
        assert sparsek._fp8_products(inputs, TOKENS, "auto") is wanted
        assert seen[0][:2] == ("prefill", "auto")
        # R x G rows share a list
        assert seen[0][3] == 32 * 2
        for arm in ("sparsek", "sparsek-attend"):
            noting = NotingGate(inputs)
            next(a for a in ARMS if a.name == arm).prepare(inputs, noting, TOKENS)
            assert noting.excused is wanted
        assert not sparsek._fp8_products(Inputs(CHUNK, CPU), TOKENS, "auto")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda output: torch.zeros_like(output),
        lambda output: torch.full_like(output, float("nan")),
        lambda output: output * 1.02,
        lambda output: output.roll(1, 2),
    ],
    ids=["zeros", "nothing written", "two percent", "heads swapped"],
)
def test_the_gate_refuses_a_wrong_output(spoil):
    _, prepared, output = judged("sparsek-attend", PREFILL, TOKENS)
    assert not prepared.judge(spoil(output)).ok


@pytest.mark.parametrize("budget", [TOKENS, PAGES], ids=["tokens", "pages"])
def test_the_gate_refuses_attention_over_another_selection(budget):
    inputs, prepared, output = judged("sparsek-attend", DECODE, budget)
    assert prepared.judge(output).ok
    # one unit less than what was selected
    for s in inputs._units:
        inputs._units[s][..., -1] = -1
    spoiled = next(arm for arm in ARMS if arm.name == "sparsek-attend")
    again = spoiled.prepare(inputs, gate.Gate(inputs), budget)
    verdict = again.judge(again.calls[0]())
    assert not verdict.ok
    assert verdict.reason.startswith("selection:")
    # the earlier gate knows what should have been read
    assert not prepared.judge(again.calls[0]()).ok


def test_the_gate_refuses_a_query_that_does_not_see_itself():
    inputs, _, _ = judged("sparsek-attend", DECODE, TOKENS)
    expected = gate.expect_dense(inputs)
    blind = gate.Expected(inputs, lambda row, position, head: torch.arange(position))
    output = torch.zeros(2, 1, 4, 64, dtype=torch.float64)
    for at, exact in zip(blind.samples, blind.exact, strict=True):
        output[at.row, at.query, at.head] = exact
    assert not expected.check(output).ok
    assert blind.check(output).ok


def test_pytorch_chooses_as_without_vllm_whose_import_forbids_cudnn(monkeypatch):
    seen, real = [], sdpa.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append(
            (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
        )
        return real(*args, **kwargs)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
        judged("sdpa", PREFILL)
        assert set(seen) == {(True, True)}
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_dense_arms_and_local_windows_are_held_to_their_own_masks():
    _, prepared, output = judged("sdpa", PREFILL)
    assert prepared.judge(output).ok
    local = gate.Gate(Inputs(PREFILL, CPU)).dense(local_window=40)
    assert not local(output.transpose(1, 2)).ok


@pytest.mark.parametrize("budget", [TOKENS, PAGES], ids=["tokens", "pages"])
def test_selections_are_compared_as_sets(budget):
    _, prepared, units = judged("sparsek-select", PREFILL, budget)
    assert prepared.judge(units).ok
    assert prepared.judge(units.flip(-1)).ok
    full = (units >= 0).all(-1)
    double, missing, foreign = (units.clone() for _ in range(3))
    double[full] = double[full][:, :1].expand(-1, units.shape[-1])
    missing[..., 0] = -1
    foreign[full] = foreign[full].roll(1, 0)
    for wrong, why in ((double, "units instead of"), (missing, "units instead of"),
                       (foreign, "")):  # fmt: skip
        verdict = prepared.judge(wrong)
        assert not verdict.ok
        assert why in verdict.reason


def test_top_k_rows_may_break_ties_either_way_but_must_hold_the_largest():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    for indices, ok in (([0, 2], True), ([3, 0], True), ([0, 1], False), ([0, 0], False),
                        ([0, -1], False), ([0, 5], False)):  # fmt: skip
        assert gate.check_top_k(values, torch.tensor([indices])).ok is ok


def test_scores_written_elsewhere_are_refused():
    inputs, prepared, scores = judged("sparsek-scores", SCORE)
    assert prepared.judge(scores).ok
    slot = int(inputs.slots(0)[3])
    scores[slot // 16, 1, slot % 16] += 1
    assert not prepared.judge(scores).ok


@pytest.mark.parametrize("arm", ["vllm-kv-write", "sparsek-kv-write"])
def test_written_keys_values_and_learned_scores_are_held_to_what_they_should_be(monkeypatch, arm):
    def stand_in(inputs, new):
        def write():
            slots = new.batch.slot_mapping
            rows = torch.cat([new.key, new.value], dim=-1)
            inputs.kv_cache[slots // 16, :, slots % 16] = rows

        return write

    monkeypatch.setattr(kv_write, "_vllm_write", stand_in)
    inputs, prepared, cache = judged(arm, SCORE)
    assert prepared.judge(cache).ok
    slot = int(inputs.slots(0)[-1])
    if arm == "sparsek-kv-write":
        inputs.scores[slot // 16, 0, slot % 16] += 1e-3
        assert not prepared.judge(cache).ok
        assert prepared.judge(prepared.calls[0]()).ok
    cache[slot // 16, 1, slot % 16, -1] = float("nan")
    assert not prepared.judge(cache).ok


# FlashAttention-3 over page tables, with a stand-in for the library


@pytest.fixture
def fake_fa3(monkeypatch):
    module = types.ModuleType("vllm.vllm_flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.is_fa_version_supported = lambda version: version == 3
    module.fa_version_unsupported_reason = lambda version: "why not"
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    monkeypatch.setattr(measure, "quick", lambda call: call() is None)
    import_fault.cache_clear()
    compat.flash_attention_3.cache_clear()
    yield module
    import_fault.cache_clear()
    compat.flash_attention_3.cache_clear()


FLASH_ATTENTION = pytest.mark.parametrize(
    ("arm", "budget"),
    [("fa3", None), ("fa3-pages", TOKENS), ("fa3-pages", PAGES)],
    ids=["dense", "tokens", "pages"],
)


def run_green(arm, budget, case):
    """Runs an arm, which must be right; returns it, its inputs and the row."""
    adapter = next(found for found in ARMS if found.name == arm)
    assert adapter.fault(case, budget) == ""
    filled = row(arm, case, budget, gate=None, us=None)
    # two input sets: the second one's requests must not reach into the first one's
    inputs = Inputs(case, CPU, sets=2)
    run_arm(filled, adapter, inputs, gate.Gate(inputs), budget, call_once)
    assert (filled.gate, filled.us) == (True, 1.0), filled.reason
    return adapter, inputs, filled


@pytest.mark.parametrize("case", [DECODE, PREFILL, CHUNK], ids=["decode", "prefill", "chunk"])
@FLASH_ATTENTION
def test_flash_attention_gets_tables_that_hold_what_is_read(fake_fa3, arm, budget, case):
    _, _, filled = run_green(arm, budget, case)
    assert ("num_splits" in filled.note) == (case.kind == "decode")


class StrictGate(gate.Gate):
    """Excuses nobody who multiplies in fp8."""

    def dense(self, local_window=None, fp8_products=False):
        return super().dense(local_window)

    def sparse(self, budget, fp8_products=False):
        return super().sparse(budget)


@pytest.mark.parametrize("case", [FP8_DECODE, FP8_CHUNK], ids=["decode", "chunk"])
@FLASH_ATTENTION
def test_flash_attention_over_an_fp8_cache_is_right_by_the_error_of_fp8_alone(
    fake_fa3, arm, budget, case
):
    adapter, inputs, filled = run_green(arm, budget, case)
    assert 0.05 < filled.error_share < 1
    # what attention without such rounding may be wrong by is too little
    run_arm(filled, adapter, inputs, StrictGate(inputs), budget, call_once)
    assert filled.gate is False
    # and wrong scales are beyond both
    prepared = adapter.prepare(inputs, gate.Gate(inputs), budget)
    assert prepared.judge(prepared.calls[0]()).ok
    right = inputs.kv_scales
    for wrong in ("swapped", "of keys ignored", "of values ignored"):
        inputs.kv_scales = WRONG_SCALES[wrong](*right)
        again = adapter.prepare(inputs, gate.Gate(inputs), budget)
        assert not prepared.judge(again.calls[0]()).ok, wrong


def test_engines_that_our_tables_choose_from_run_side_by_side_in_shapes_of_both_kinds():
    found = cases.choose("engines").cases
    assert {(case.kind, case.cache) for case in found} == {
        (kind, cache) for kind in ("prefill", "decode") for cache in (None, "float8_e4m3fn")
    }
    for case in found:
        arms = {arm.name: arm for arm in arms_of(case)}
        names = list(arms)
        assert case.against == "sparsek-triton"
        if (case.kind, case.cache) != ("decode", "float8_e4m3fn"):
            assert names.index("sparsek-triton") < names.index("sparsek-fa3")
        if case.cache is not None:
            assert all(arm.quantised for arm in arms.values())


def test_arms_that_read_no_fp8_cache_say_so_and_do_not_run(fake_fa3):
    by_name = {arm.name: arm for arm in ARMS}
    readers = {name for name, arm in by_name.items() if arm.quantised}
    assert readers == {
        "fa3", "fa3-pages", "sparsek", "sparsek-attend", "sparsek-triton", "sparsek-fa3",
        "sparsek-select",
    }  # fmt: skip
    for arm in ARMS:
        for case in (FP8_DECODE, FP8_CHUNK):
            if case.kind in arm.kinds and arm.name not in readers:
                assert arm.fault(case, TOKENS).startswith("the cache is float8_e4m3fn"), arm.name
    assert by_name["sparsek-fa3"].fault(FP8_CHUNK, TOKENS) == ""
    assert "queries would be rounded" in by_name["sparsek-fa3"].fault(FP8_DECODE, TOKENS)
    assert by_name["sdpa"].fault(CHUNK, None) == by_name["sdpa"].unavailable(CHUNK, None) != ""


def test_what_cannot_run_says_why(fake_fa3):
    by_name = {arm.name: arm for arm in ARMS}
    fake_fa3.is_fa_version_supported = lambda version: False
    assert by_name["fa3"].unavailable(DECODE, None) == "why not"
    assert by_name["sparsek-fa3"].unavailable(DECODE, TOKENS) == "no FlashAttention-3: why not"
    assert "whole prompts" in by_name["sdpa"].unavailable(CHUNK, None)
    assert "KV heads" in by_name["xformers"].unavailable(PREFILL, None)
    mha = replace(PREFILL, query_heads=2)
    assert by_name["xformers-local"].unavailable(replace(mha, local_window=None), None) == (
        "the case has no local_window"
    )
    assert import_fault("no_such_module_anywhere").startswith("ModuleNotFoundError: No module")
