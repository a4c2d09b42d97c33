"""The kernel benchmark's parts before a time is taken: cases, densities, inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CASES,
    CHUNK,
    CPU,
    DECODE,
    FP8_CHUNK,
    FP8_DECODE,
    IDS,
    PAGES,
    PREFILL,
    TOKENS,
)

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.reference import visible_positions
from vllm_sparsek.kernels.select import reference as select_reference
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import cases, work
from vllm_sparsek.serving_bench.kernel_bench.arms import arms_of
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs, input_sets

BUDGETS = {
    "tokens": TOKENS,
    "pages": PAGES,
    "own selection": Budget(20, 10, 0, 1),
    "fits": Budget(300, 16, 4, 64),
    "no sinks, wide refresh": Budget(16, 8, 0, 128),
}


# cases


def test_shipped_sets_have_the_promised_groups_and_only_arms_that_exist():
    everything = cases.choose()
    assert {case.group for case in everything.cases} == {
        "micro", "tiers", "decode", "select", "score", "prefill", "long", "engines"
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
        (", cache: fp8}", "set: cases.0.cache: Input should be 'float8_e4m3fn'"),
        (", kind: score, cache: float8_e4m3fn}", "set: cache is a key of prefill and decode, not"),
    ],
    ids=["unknown key", "chunk", "heads", "budget", "not YAML", "cache", "cache of another kind"],
)
def test_a_faulty_set_names_the_fault(more, message):
    text = ENTRY.replace("heads: 4, ", "") if more.startswith(", heads") else ENTRY
    text = text.replace("kind: decode, ", "") if more.startswith(", kind") else text
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


@pytest.mark.parametrize("budget", [None, TOKENS, PAGES], ids=["dense", "tokens", "pages"])
@pytest.mark.parametrize(
    ("case", "tokens"), [(FP8_DECODE, None), (FP8_CHUNK, 200)], ids=["decode", "chunk"]
)
def test_a_number_of_an_fp8_cache_is_one_byte_and_queries_and_outputs_stay_two(
    case, tokens, budget
):
    plain, found = work.attention(replace(case, cache=None), budget), work.attention(case, budget)
    read = tokens or work.tokens_read(case, budget).max()
    assert plain.bytes - found.bytes == 2 * 2 * read * 2 * 64
    assert (found.flops, found.density) == (plain.flops, plain.density)
    # sets are smaller: more of them overrun the L2 cache
    assert input_sets(case, 500_000) > input_sets(replace(case, cache=None), 500_000)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_input_sets_are_larger_than_the_cache_they_must_not_fit(case):
    sets = input_sets(case, l2_bytes=200_000)
    if case.kind == "training":
        assert sets == 1
    elif case.kind == "decode":
        least = min(work.attention(case, budget).bytes for budget in case.budgets)
        assert sets * least >= 2 * 200_000 > (sets - 1) * least
    assert input_sets(replace(DECODE, batch=64, context=131072), 2**26) < 48
    # what memory holds at most
    long = [replace(case, batch=64, context=131072) for case in (DECODE, FP8_DECODE)]
    assert [input_sets(case, 2**40) for case in long] == [8, 16]


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


def test_an_fp8_cache_times_its_scales_is_what_was_drawn(monkeypatch):
    # parts of a few blocks
    monkeypatch.setattr("vllm_sparsek.serving_bench.kernel_bench.inputs.QUANTISED_AT_ONCE", 9000)
    inputs = Inputs(FP8_CHUNK, CPU, sets=2)
    assert inputs.kv_cache.dtype == torch.float8_e4m3fn
    assert all(s.shape == () and s.dtype == torch.float32 for s in inputs.kv_scales)
    values = inputs.kv_cache.float()
    for half, scale in zip(values.chunk(2, dim=-1), inputs.kv_scales, strict=True):
        # normal numbers: with one scale for the other the deviation would be off by four fifths
        assert (half * scale).std().item() == pytest.approx(1, abs=0.02)
        assert (half * scale).mean().item() == pytest.approx(0, abs=0.02)
    dense = inputs.key_value(1)
    block = int(inputs.table[2 * 1 + 1, 150 // 16])
    assert torch.equal(dense[1, 150].float(), values[block, :, 150 % 16])
    meant = inputs.dequantised(dense)
    assert meant.dtype == torch.float64
    assert torch.equal(meant[..., -1], dense[..., -1].double() * inputs.kv_scales[1])
    huge = inputs._quantised(torch.full((1, 128), 1e6)).float()
    assert torch.equal(huge, torch.full((1, 128), 448.0))
