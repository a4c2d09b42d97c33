"""The kernel benchmark's parts: cases, densities, gate, page tables, results, tiers, report."""

from __future__ import annotations

import csv
import io
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CASES,
    CHUNK,
    CPU,
    DECODE,
    IDS,
    PAGES,
    PREFILL,
    SCORE,
    SELECT,
    TOKENS,
    call_once,
    results,
    row,
)
from rich.console import Console

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.reference import visible_positions
from vllm_sparsek.kernels.select import reference as select_reference
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import cases, gate, measure, report, tiers, work
from vllm_sparsek.serving_bench.kernel_bench.arms import ARMS, arms_of, kv_write
from vllm_sparsek.serving_bench.kernel_bench.arms.base import import_fault
from vllm_sparsek.serving_bench.kernel_bench.cases import Tier
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs, input_sets
from vllm_sparsek.serving_bench.kernel_bench.results import new_row
from vllm_sparsek.serving_bench.kernel_bench.run import run_arm

BUDGETS = {
    "tokens": TOKENS,
    "pages": PAGES,
    "own selection": Budget(20, 10, 0, 1),
    "fits": Budget(300, 16, 4, 64),
    "no sinks, wide refresh": Budget(16, 8, 0, 128),
}
T1 = Tier(us_per_head=3.82, inclusive=True, density=0.43, speedup=1.0, beats=["sdpa"])
T2 = Tier(us_per_head=3.0, density=0.23, speedup=1.27, beats=["xformers", "xformers-local"])
HEADS = PREFILL.batch * PREFILL.query_heads


# cases


def test_shipped_sets_have_the_promised_groups_and_only_arms_that_exist():
    everything = cases.choose()
    assert {case.group for case in everything.cases} == {
        "micro", "tiers", "decode", "select", "score", "prefill", "long"
    }  # fmt: skip
    for case in everything.cases:
        names = [arm.name for arm in arms_of(case)]
        assert names, case.name
        # a speed-up needs its reference in the same case, measured before
        if case.against is not None:
            assert case.against in names, case.name
    assert set(everything.tiers) == {"T1", "T2", "T3"}


def test_the_tier_shape_is_the_users_and_every_tier_has_budgets_that_are_dense_enough():
    choice = cases.choose("gpt4")
    (case,) = choice.cases
    shape = (case.batch, case.query_heads, case.kv_heads, case.context, case.head_dim, case.dtype)
    assert shape == (16, 96, 96, 4096, 128, "float16")
    densities = [work.density(case, budget) for budget in case.budgets]
    wanted = [tier.density for tier in choice.tiers.values()]
    assert wanted == [0.43, 0.23, 0.12]
    for least in wanted:
        # enough, and not much more than was asked for
        assert sum(least <= found <= least + 0.01 for found in densities) >= 3
    assert {budget.refresh for budget in case.budgets} == {64, 128}
    assert {budget.unit for budget in case.budgets} == {1, case.page}


def test_choices_filter_and_sweeps_run_only_when_asked_for():
    everything = cases.choose().cases
    sweeps, others = cases.choose(sweep=True).cases, [c for c in everything if not c.sweep]
    assert sweeps and all(case.sweep for case in sweeps)
    assert len(sweeps) + len(others) == len(everything)
    micro = cases.choose(groups=["micro", "score"]).cases
    assert {case.group for case in micro} == {"micro", "score"}
    assert not any(case.sweep for case in cases.choose(groups=["decode"]).cases)
    assert cases.choose("llama").tiers == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "gpt5"}, "no --config 'gpt5'; did you mean 'gpt4'?"),
        ({"groups": ["tier"]}, "no group 'tier' to --run; did you mean 'tiers'?"),
        ({"config": "gpt4", "sweep": True}, "no case has all that was asked for"),
    ],
    ids=["config", "group", "nothing left"],
)
def test_a_choice_that_is_not_there_is_one_line(arguments, message):
    with pytest.raises(BenchError, match=message.replace("?", r"\?")):
        cases.choose(**arguments)


ENTRY = (
    "description: d\ncases:\n  - {group: g, kind: decode, shapes: [[1, 64]], heads: 4, "
    "kv_heads: 2, head_dim: 64, dtype: float16"
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (", head: 3}", "set: cases.0: unknown key 'head'; did you mean 'heads'?"),
        (", chunk: 65}", "set: chunk 65 is longer than the context 64"),
        (", heads: 3}", "set: heads 3 is not a multiple of kv_heads 2"),
        (", budgets: [{k: 0, window: 1}]}", "set: cases.0.budgets.0.k: Input should be greater"),
        (", a: [}", "set: while parsing"),
    ],
    ids=["unknown key", "chunk", "heads", "budget", "not YAML"],
)
def test_a_faulty_set_names_the_fault(more, message):
    text = ENTRY.replace("heads: 4, ", "") if more.startswith(", heads") else ENTRY
    with pytest.raises(BenchError) as error:
        cases.parse(text + more, "set")
    assert str(error.value).startswith(message)


def test_an_arm_that_does_not_exist_is_refused_before_anything_runs():
    with pytest.raises(BenchError, match="no arm 'sparsk'; did you mean 'sparsek'"):
        arms_of(replace(DECODE, arms=("sparsk",)))
    with pytest.raises(BenchError, match="no arm 'sdpa'"):
        arms_of(replace(DECODE, against="sdpa"))


# what a case asks for


def brute_force_pairs(case, budget, scores):
    """Pairs of (query, token) read, counted one query at a time."""
    table = torch.arange(1, scores.shape[0], dtype=torch.int32)[None]
    pairs = 0
    for position in range(case.context - case.queries, case.context):
        units, _ = select_reference.select(
            scores, table, torch.tensor([0]), torch.tensor([position]), budget
        )
        kept = units[0, 0]
        pairs += len(visible_positions(position, kept[kept >= 0], budget))
    return pairs


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("case", [PREFILL, CHUNK, DECODE], ids=["prefill", "chunk", "decode"])
def test_density_is_what_brute_force_counts(case, budget):
    scores = torch.randn(14, 1, 16, generator=torch.Generator().manual_seed(0))
    pairs = brute_force_pairs(case, budget, scores)
    positions = range(case.context - case.queries, case.context)
    causal = sum(position + 1 for position in positions)
    assert work.density(case, budget) == pytest.approx(pairs / causal)
    flops = work.attention(case, budget).flops
    assert flops == pytest.approx(4 * case.head_dim * pairs * case.batch * case.query_heads)


def test_density_of_dense_and_local_attention():
    assert work.density(PREFILL, None) == 1.0
    local = sum(min(i + 1, 40) for i in range(200)) / (200 * 201 / 2)
    assert work.density(PREFILL, None, 40) == pytest.approx(local)


def test_bytes_of_a_decode_step_are_keys_values_query_output_and_list():
    # 2 requests x 2 KV heads; 4 sinks + 24 kept + 16 window + 7 of the refresh block
    item, rows = 2, 2 * 2 * 4 * 64 * 2
    kept = 2 * 2 * (4 + 24 + 16 + 7) * 2 * 64 * item
    assert work.attention(DECODE, TOKENS).bytes == kept + rows + 2 * 2 * 24 * 4
    assert work.attention(DECODE, None).bytes == 2 * 2 * 200 * 2 * 64 * item + rows


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_input_sets_are_larger_than_the_cache_they_must_not_fit(case):
    sets = input_sets(case, l2_bytes=200_000)
    if case.kind == "training":
        assert sets == 1
    elif case.kind == "decode":
        least = min(work.attention(case, budget).bytes for budget in case.budgets)
        assert sets * least >= 2 * 200_000 > (sets - 1) * least
    assert input_sets(replace(DECODE, batch=64, context=131072), 2**26) < 48


def test_inputs_are_paged_and_every_set_has_its_own_requests():
    inputs = Inputs(CHUNK, CPU, sets=3)
    assert sorted(inputs.table.flatten().tolist()) == list(range(1, inputs.kv_cache.shape[0]))
    dense = inputs.key_value(2)
    assert dense.shape == (2, 200, 2, 128)
    block = int(inputs.table[2 * 2 + 1, 150 // 16])
    assert torch.equal(dense[1, 150], inputs.kv_cache[block, :, 150 % 16])
    slot = int(inputs.slots(2)[90 + 150 - 110])
    assert (slot // 16, slot % 16) == (block, 150 % 16)
    items = inputs.items(32, 2)
    assert items.row.tolist() == [4] * 4 + [5] * 4
    assert items.position.tolist() == [110, 128, 160, 192] * 2
    assert items.length.tolist() == [18, 32, 32, 8] * 2
    assert items.start.tolist() == [0, 18, 50, 82, 90, 108, 140, 172]


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


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
    softmax_scale=None, causal=False, block_table=None, out=None, num_splits=0, fa_version=0,
):  # fmt: skip
    """Causal attention aligned to the bottom right, in plain torch."""
    assert (causal, fa_version) == (True, 3)
    group = q.shape[1] // k.shape[2 if block_table is not None else 1]
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        assert end - begin <= max_seqlen_q
        if block_table is None:
            rows = slice(*cu_seqlens_k[i : i + 2].tolist())
            key, value = k[rows], v[rows]
        else:
            length = int(seqused_k[i])
            assert length <= max_seqlen_k
            pages = block_table[i].long()
            key, value = k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]
        key, value = (t.repeat_interleave(group, 1).transpose(0, 1).float() for t in (key, value))
        query = q[begin:end].transpose(0, 1).float()
        behind = torch.ones(query.shape[1], key.shape[1]).tril(key.shape[1] - query.shape[1])
        logits = (query @ key.mT * softmax_scale).masked_fill(behind == 0, float("-inf"))
        out[begin:end] = (logits.softmax(-1) @ value).transpose(0, 1).to(out.dtype)


@pytest.fixture
def fake_fa3(monkeypatch):
    module = types.ModuleType("vllm.vllm_flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.is_fa_version_supported = lambda version: version == 3
    module.fa_version_unsupported_reason = lambda version: "why not"
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    monkeypatch.setattr(measure, "quick", lambda call: call() is None)
    import_fault.cache_clear()
    yield module
    import_fault.cache_clear()


@pytest.mark.parametrize("case", [DECODE, PREFILL, CHUNK], ids=["decode", "prefill", "chunk"])
@pytest.mark.parametrize(
    ("arm", "budget"),
    [("fa3", None), ("fa3-pages", TOKENS), ("fa3-pages", PAGES)],
    ids=["dense", "tokens", "pages"],
)
def test_flash_attention_gets_tables_that_hold_what_is_read(fake_fa3, arm, budget, case):
    adapter = next(found for found in ARMS if found.name == arm)
    assert adapter.unavailable(case, budget) == ""
    filled = row(arm, case, budget, gate=None, us=None)
    # two input sets: the second one's requests must not reach into the first one's
    inputs = Inputs(case, CPU, sets=2)
    run_arm(filled, adapter, inputs, gate.Gate(inputs), budget, call_once)
    assert (filled.gate, filled.us) == (True, 1.0), filled.reason
    assert ("num_splits" in filled.note) == (case.kind == "decode")


def test_what_cannot_run_says_why(fake_fa3):
    by_name = {arm.name: arm for arm in ARMS}
    fake_fa3.is_fa_version_supported = lambda version: False
    assert by_name["fa3"].unavailable(DECODE, None) == "why not"
    assert "whole prompts" in by_name["sdpa"].unavailable(CHUNK, None)
    assert "KV heads" in by_name["xformers"].unavailable(PREFILL, None)
    mha = replace(PREFILL, query_heads=2)
    assert by_name["xformers-local"].unavailable(replace(mha, local_window=None), None) == (
        "the case has no local_window"
    )
    assert import_fault("no_such_module_anywhere").startswith("ModuleNotFoundError: No module")


# results


def test_a_speed_up_needs_both_gates_green_and_the_same_part():
    dense = row("sdpa", us=300.0)
    cases_of = {
        "green": (row("sparsek-attend", budget=TOKENS), 3.0),
        "red": (row("sparsek-attend", budget=TOKENS, gate=False), None),
        "not judged": (row("sparsek-attend", budget=TOKENS, gate=None), None),
        "both parts": (row("sparsek", budget=TOKENS, part="attention+selection"), 3.0),
        "selection": (row("sparsek-select", budget=TOKENS, part="selection"), None),
        "other case": (row("sparsek-attend", budget=TOKENS, case_id=1), None),
        "failed": (row("sparsek-attend", budget=TOKENS, us=None, status="failed"), None),
    }
    for name, (other, wanted) in cases_of.items():
        assert results(dense, other).speedup(other) == wanted, name
    other = cases_of["green"][0]
    assert results(row("sdpa", us=300.0, gate=False), other).speedup(other) is None
    assert results(other).speedup(other) is None
    assert results(dense).speedup(dense) is None


def test_rows_carry_bandwidth_flops_and_cost_per_head():
    run = results(row("sdpa"))
    (found,) = run.table()
    assert found["us_per_head"] == pytest.approx(100.0 / HEADS)
    assert found["gb_per_s"] == pytest.approx(1000.0)
    assert found["copy_share"] == pytest.approx(0.25)
    assert found["tflops"] == pytest.approx(100.0)


def test_json_and_csv_hold_what_was_measured(tmp_path):
    failed = row("xformers", us=None, gate=None, status="failed", reason="out of memory")
    run = results(row("sdpa", us=300.0), row("sparsek", budget=TOKENS), failed, tiers={"T1": T1})
    report.save_data(run, tmp_path)
    again = report.load(tmp_path)
    assert again == run
    with (tmp_path / report.CSV_NAME).open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["arm"] for line in lines] == ["sdpa", "sparsek", "xformers"]
    assert float(lines[1]["speedup"]) == 3.0
    assert lines[1]["budget"] == "s4+k24+w16 R32 token"
    assert (lines[2]["us"], lines[2]["reason"]) == ("", "out of memory")
    assert {line["device"] for line in lines} == {"Fabricated"}
    (tmp_path / report.JSON_NAME).write_text("{}")
    with pytest.raises(BenchError, match="is no result of the kernel benchmark"):
        report.load(tmp_path)


# tiers


def tier_run(cost, tier=T1, dense=8.64, density=0.44, **fields):
    """A run whose sparse result costs so many us per (batch x head)."""
    rows = [
        row("sdpa", us=dense * HEADS),
        row("xformers", us=13.5 * HEADS),
        row("xformers-local", us=5.5 * HEADS),
        row("sparsek", budget=TOKENS, us=cost * HEADS, density=density,
            part="attention+selection", **fields),
    ]  # fmt: skip
    return results(*rows, tiers={"T": tier})


@pytest.mark.parametrize(
    ("run", "passed", "why"),
    [
        (tier_run(3.5), True, ""),
        (tier_run(3.0, T2), False, "1.00x the target"),
        (tier_run(2.99, T2), True, ""),
        (tier_run(4.2), False, "1.10x the target"),
        (tier_run(3.5, density=0.42), False, "no density of 0.43 or more"),
        (tier_run(3.5, gate=False), False, "no gate is green"),
        (tier_run(3.5, dense=3.0), False, "0.86x over sdpa, 1.00x asked for"),
        (results(tiers={"T": T1}), False, "no result"),
    ],
    ids=["pass", "not below", "below", "slow", "too sparse", "red", "dense is faster", "empty"],
)
def test_tiers_say_pass_or_what_is_missing(run, passed, why):
    (outcome,) = tiers.judge(run)
    assert (outcome.passed, outcome.why) == (passed, why)


def test_a_tier_passes_only_against_rivals_that_were_measured_and_are_right():
    for change, why in (
        ({"us": None, "gate": None, "status": "unavailable", "reason": "no wheel"},
         "xformers was not measured: no wheel"),
        ({"gate": False}, "the gate of xformers is not green"),
        ({"us": 2.5 * HEADS}, "not faster than xformers"),
    ):  # fmt: skip
        run = tier_run(2.9, T2)
        run.rows[1] = run.rows[1].model_copy(update=change)
        (outcome,) = tiers.judge(run)
        assert (outcome.passed, outcome.why) == (False, why)


def test_the_fastest_result_that_is_dense_enough_counts():
    run = tier_run(3.5)
    faster = row("sparsek", budget=PAGES, us=2.0 * HEADS, density=0.2, part="attention+selection")
    run.rows.append(faster)
    (outcome,) = tiers.judge(run)
    assert outcome.row is run.rows[3]


# report


def printed(run):
    console = Console(width=80, record=True, file=io.StringIO())
    from vllm_sparsek.serving_bench.kernel_bench.report import table

    table.show(run, console)
    return console.export_text()


def test_the_tables_show_figures_gates_reasons_and_tiers():
    run = tier_run(3.5)
    run.rows.append(row("fa3", us=None, gate=None, status="unavailable", reason="no such wheel"))
    run.rows[3].user_bound = 2e-3
    text = printed(run)
    assert "speed-up over sdpa" in text
    assert "2.47x" in text
    assert "green" in text
    assert "unavailable: no such wheel" in text
    assert "copy 4,000 GB/s, bf16 matmul 600 TFLOP/s" in text
    assert "pass" in text and "FAIL" not in text
    assert "yes" in text


def test_a_red_gate_prints_no_speed_up():
    run = tier_run(3.5, gate=False, reason="differs from float64")
    text = printed(run)
    assert "RED" in text
    assert "gate: differs from float64" in text
    assert "2.47x" not in text
    assert "FAIL" in text


def test_the_roofline_shows_green_rows_with_flops(tmp_path):
    from vllm_sparsek.serving_bench.kernel_bench.report import roofline

    run = results(
        row("sdpa"),
        row("sparsek", budget=TOKENS, gate=False),
        row("sparsek-select", flops=None),
        row("xformers", us=None, status="failed"),
    )
    assert [found.arm for found, _, _ in roofline.points(run)] == ["sdpa"]
    for some in (run, results(ceilings={})):
        assert roofline.render(some).startswith(b"\x89PNG")


def test_a_new_row_names_case_and_budget():
    made = new_row(3, SELECT, PAGES, "sparsek-select", "selection")
    assert made.case == "select B2 H4/2 S200 D64 float16"
    assert (made.unit, made.refresh, made.budget) == (16, 32, "s3+k32+w24 R32 page16")
    assert CHUNK.name == "prefill B2 H4/2 S90 of 200 D64 float16"


# times


@pytest.fixture
def clock(monkeypatch):
    """Events that say what a list says, and graphs of as many calls as were captured."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def install(us, capture=None):
        def events(calls, samples, per_sample=1):
            return [us / per_sample] * samples

        def graph(calls):
            if capture is not None:
                raise capture
            return types.SimpleNamespace(replay=lambda: None), 10

        monkeypatch.setattr(measure, "_events", events)
        monkeypatch.setattr(measure, "_capture", graph)

    return install


@pytest.mark.parametrize(
    ("us", "capturable", "wanted"),
    [(5000.0, True, ("events", 5000.0)), (500.0, True, ("graph", 50.0)),
     (500.0, False, ("events", 500.0))],
    ids=["long", "short", "training"],
)  # fmt: skip
def test_short_calls_are_replayed_from_a_graph_of_several(clock, us, capturable, wanted):
    clock(us)
    called = []
    timing = measure.time_calls([lambda: called.append(0), lambda: called.append(1)], capturable)
    assert (timing.how, timing.us) == wanted
    assert timing.samples == measure.SAMPLES >= 20
    # every input set is warm before anything is timed
    assert {0, 1} <= set(called)


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(clock):
    clock(500.0, RuntimeError("operation not permitted\nmore"))
    timing = measure.time_calls([lambda: None])
    assert (timing.how, timing.note) == ("events", "not captured: operation not permitted")
