"""What is made of the kernel benchmark's times: results, tiers, tables, and how they are taken."""

from __future__ import annotations

import csv
import io
import types

import pytest
import torch
from kernel_cases import (
    CHUNK,
    FP8_CHUNK,
    PAGES,
    PREFILL,
    SELECT,
    TOKENS,
    results,
    row,
)
from rich.console import Console

from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import measure, report, tiers
from vllm_sparsek.serving_bench.kernel_bench.cases import Tier
from vllm_sparsek.serving_bench.kernel_bench.results import new_row

T1 = Tier(us_per_head=3.82, inclusive=True, density=0.43, speedup=1.0, beats=["sdpa"])
T2 = Tier(us_per_head=3.0, density=0.23, speedup=1.27, beats=["xformers", "xformers-local"])
HEADS = PREFILL.batch * PREFILL.query_heads


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
    assert made.cache is None
    quantised = new_row(3, FP8_CHUNK, PAGES, "sparsek-attend", "attention")
    assert quantised.case == "prefill B2 H4/2 S90 of 200 D64 float16 cache float8_e4m3fn"
    assert (quantised.dtype, quantised.cache) == ("float16", "float8_e4m3fn")


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
