"""From raw answers to figures, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console

from vllm_sparsek.evaluation import report, texts
from vllm_sparsek.evaluation.plan import DENSE, PERPLEXITY, Cell, budget_settings, parse_arm
from vllm_sparsek.evaluation.prompts import Job
from vllm_sparsek.evaluation.results import Results, increase, increase_interval, rows_of, wilson
from vllm_sparsek.serving_bench.errors import BenchError

COUNTS = {"tokens_attended": 50, "context_tokens": 100,
          "decode_tokens_attended": 25, "decode_context_tokens": 100}  # fmt: skip
DENSE_CELL = Cell(DENSE, None, DENSE, 4096, None)


def cell(arm="knorm", budget=0.25, column="all"):
    return Cell(arm, budget, column, 4096, {"scorer": arm})


def task(name, count=4):
    return Job(name, name, None, "", [[str(i)] for i in range(count)], 0)


def text(name):
    return Job(f"perplexity: {name}", PERPLEXITY, None, "", [], 0)


def answers(right, count=4):
    said = [str(i) if i < right else "-" for i in range(count)]
    return {"answers": said, "counters": COUNTS, "seconds": 1.0}


def losses(*nll, last=None):
    last = last if last is not None else nll
    windows = [{"nll": a, "tokens": 10, "nll_last": b, "tokens_last": 2}
               for a, b in zip(nll, last, strict=True)]  # fmt: skip
    return {"losses": windows, "counters": COUNTS, "seconds": 1.0}


def made(rows, **changes):
    empty = Results(
        command=["vllm-sparsek", "eval"],
        model="org/<model>",
        started_utc="2026-01-01T00:00:00Z",
        environment={"device": "a CPU"},
        settings={},
        arms={DENSE: None, "knorm": {"scorer": "knorm"}},
    )
    return dataclasses.replace(empty, rows=rows, **changes)


@pytest.fixture
def full():
    """Two compared tasks, one that dense fails, one text."""
    rows = []
    right = {"multi-key": (4, 3), "passkey": (4, 1), "needle-noise": (0, 4)}
    for name, (dense, ours) in right.items():
        rows += rows_of(DENSE_CELL, task(name), answers(dense), answers(dense))
        rows += rows_of(cell(), task(name), answers(ours), answers(dense))
    rows += rows_of(DENSE_CELL, text("book"), losses(20, 30), losses(20, 30))
    rows += rows_of(cell(), text("book"), losses(21, 31), losses(20, 30))
    refused = {"arm": "quest", "column": "all", "reason": "it reads prompts densely only"}
    return made(rows, unavailable=[refused])


def test_the_headline_is_the_worst_task_that_dense_can_do(full):
    _, ours = full.summaries()
    assert (ours.worst_task, ours.worst) == ("passkey", 0.25)
    assert ours.ruler == ours.ruler_relative == 0.75
    assert ours.density == 0.25
    assert ours.increase == pytest.approx(math.exp(2 / 20) - 1)
    assert ours.increase_last == pytest.approx(math.exp(2 / 4) - 1)
    assert full.left_out() == {4096: ["needle-noise"]}


def test_a_score_has_its_interval_dense_value_and_densities():
    (row,) = rows_of(cell(), task("passkey"), answers(3), answers(4))
    assert (row.value, row.dense, row.relative, row.n) == (0.75, 1.0, 0.75, 4)
    assert row.low < 0.75 < row.high
    assert (row.density, row.decode_density) == (0.5, 0.25)


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_intervals_hold_the_mean_and_lie_between_0_and_1(share, n):
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_wilsons_interval_of_45_in_50_is_the_published_formulas():
    low, high = wilson(0.9, 50)
    assert (round(low, 3), round(high, 3)) == (0.786, 0.957)


def test_perplexity_is_compared_window_by_window():
    dense, ours = losses(20, 40)["losses"], losses(21, 41)["losses"]
    assert increase(ours, dense, "") == pytest.approx(math.exp(0.1) - 1)
    low, high = increase_interval(ours, dense, "")
    # the same difference on every window, however much the windows differ
    assert low == pytest.approx(high) == pytest.approx(math.exp(0.1) - 1)
    assert increase_interval(ours[:1], dense[:1], "") == (None, None)


def shown(of, width=80):
    stream = io.StringIO()
    report.show(of, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_table_fits_80_columns_and_says_what_is_left_out(full):
    said = shown(full)
    table, notes = said.split("RULER and worst:")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert "passkey" in table
    assert "left out at 4096" in notes
    assert "needle-noise" in notes
    assert "n/a: quest, all: it reads prompts densely only" in notes


def test_the_page_escapes_what_comes_from_outside_and_needs_nothing_else(full, tmp_path):
    report.save_all(full, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "org/&lt;model&gt;" in page
    assert 'src="http' not in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "quest" in page


def test_there_is_a_plot_for_every_measure_that_has_a_value(full, tmp_path):
    report.save_all(full, tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"perplexity-4096.png", "ruler-4096.png", "worst-4096.png"}
    alone = tmp_path / "alone"
    alone.mkdir()
    report.save_all(made([row for row in full.rows if row.arm == DENSE]), alone)
    assert not list(alone.glob("*.png"))


# --- plan and texts --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.12, 0.25, 0.5])
@pytest.mark.parametrize("scorer", ["knorm", "recency", "learned"])
@pytest.mark.parametrize("length", [512, 4096, 16384])
def test_a_budget_is_spent_exactly(scorer, share, length):
    settings = budget_settings(scorer, share, length)
    assert sum(settings.values()) == round(share * length)
    if scorer == "recency":
        assert settings["k"] == 1
    else:
        assert settings["window"] <= 512


def test_an_arm_is_a_scorer_with_its_file_and_settings(tmp_path):
    file = tmp_path / "mine.safetensors"
    file.touch()
    arm = parse_arm(f"learned={file}:granularity=page:refresh=128")
    assert arm.label == "learned=mine:granularity=page:refresh=128"
    assert arm.settings == {"scorer": "learned", "scorer_path": str(file),
                            "granularity": "page", "refresh": 128}  # fmt: skip
    recorded = arm.recorded
    assert recorded["scorer_path"] == "mine.safetensors", "reports name no folder"
    assert len(recorded["sha256"]) == 64
    assert parse_arm("dense").settings is None
    with pytest.raises(BenchError, match="the dense arm has no settings"):
        parse_arm("dense:k=3")


@pytest.mark.parametrize("count", [1, 3, 9])
def test_windows_are_spread_over_the_text_and_do_not_overlap(count):
    found = texts.windows(range(100), [1000], 11, count)
    assert len(found) == min(count, 10)
    assert all(window[0] == 1000 and len(window) == 11 for window in found)
    tokens = [token for window in found for token in window[1:]]
    assert len(set(tokens)) == len(tokens)


def test_two_texts_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text("Words.")
    with pytest.raises(BenchError, match="another text is called 'book'"):
        texts.read([tmp_path / "a" / "book.txt", tmp_path / "b" / "book.txt"])


def test_the_default_texts_are_long_enough_for_long_windows():
    assert all(len(text.content) > 200_000 for text in texts.default())
