"""The serving benchmark's quality column: asked of every server, compared with the dense one."""

import csv
import json
import math

import pytest
from fake import bench, last_line
from rich.console import Console

from vllm_sparsek.serving_bench import quality, report
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.results import Results, columns
from vllm_sparsek.serving_bench.server import Endpoint

DENSE = math.exp(2.0)
CHANGE = math.exp(0.02) - 1


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a <book>.txt"
    path.write_text("what is read " * 500)
    return path


def read(fake):
    out = fake.parent / "out"
    return (
        json.loads((out / "results.json").read_text()),
        list(csv.DictReader((out / "results.csv").open())),
        (out / "report.html").read_text(),
    )


def test_every_arm_reads_one_window_and_the_tables_compare_its_last_half(fake, text, capsys):
    assert bench(fake, "m", "--workloads=small", f"--quality={text}") == 0
    shown = capsys.readouterr().out
    data, rows, page = read(fake)
    # the server's context less the token that is generated
    assert data["quality_window"]["tokens"] == 4095
    assert data["quality_window"]["text"] == text.name
    assert len(data["quality_window"]["sha256"]) == 64
    dense, sparse = data["summary"]
    assert dense["perplexity"] == pytest.approx(DENSE)
    assert dense["perplexity_change"] is None
    assert sparse["perplexity"] == pytest.approx(DENSE * (1 + CHANGE))
    assert sparse["perplexity_change"] == pytest.approx(CHANGE)
    found = [float(row["perplexity"]) for row in rows]
    assert found == pytest.approx([DENSE, DENSE * (1 + CHANGE)])
    assert rows[0]["perplexity_change"] == ""
    assert float(rows[1]["perplexity_change"]) == pytest.approx(CHANGE)
    for where in (shown, page):
        assert "7.39" in where and "7.54 (+2.0 %)" in where
    assert "sparsek: quality: +2.0 % perplexity against dense" in shown
    assert "a &lt;book&gt;.txt" in page


def test_the_probe_does_not_enter_the_workloads_counters(fake, text):
    assert bench(fake, "m", "--workloads=small", "--repeat=2", f"--quality={text}") == 0
    data, _, _ = read(fake)
    assert {run["metrics"]["prompt_tokens"] for run in data["runs"]} == {400}


def test_without_the_option_there_is_no_such_column(fake):
    assert bench(fake, "m", "--workloads=small", "--arms=dense") == 0
    data, rows, page = read(fake)
    assert data["quality_window"] is None
    assert "perplexity" not in data["summary"][0] and "perplexity" not in rows[0]
    assert "erplexity" not in page


def test_a_lone_sparse_arm_has_a_perplexity_and_no_change(fake, text, capsys):
    assert bench(fake, "m", "--workloads=small", "--arms=sparsek", f"--quality={text}") == 0
    assert "7.54" in (shown := capsys.readouterr().out) and "7.54 (" not in shown
    assert read(fake)[0]["summary"][0]["perplexity_change"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b" \n", "is empty")],
    ids=["missing", "binary", "empty"],
)
def test_a_text_that_cannot_be_used_is_refused_before_a_server_starts(
    fake, tmp_path, capsys, content, message
):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert bench(fake, "m", f"--quality={path}") == 1
    assert f"--quality {path} {message}" in last_line(capsys)
    assert not (fake.parent / "out" / "logs").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-tokenize", "the quality request to /tokenize failed: HTTP Error 404"),
        ("no-logprobs", "the endpoint gives no usable prompt_logprobs"),
        ("dies-of-quality", "the server died while its quality was measured (exit status 3): "
                            "RuntimeError: out of memory"),
    ],
)  # fmt: skip
def test_a_probe_that_fails_ends_in_one_line_and_keeps_the_runs(fake, text, capsys, model, message):
    assert bench(fake, model, "--workloads=small", "--arms=dense", f"--quality={text}") == 1
    assert message in last_line(capsys)
    data, _, _ = read(fake)
    assert len(data["runs"]) == 1
    assert message in data["error"]


@pytest.fixture
def tokens(monkeypatch):
    """``tokens(n)``: the server's tokenizer makes n tokens of any text."""

    def answer(count):
        reply = json.dumps({"tokens": list(range(count))})
        monkeypatch.setattr(quality.http, "post", lambda *_: reply)

    return answer


@pytest.mark.parametrize(
    ("count", "context", "length"),
    [(99999, None, 8128), (99999, 65536, 8128), (99999, 8192, 8128), (99999, 2048, 2047),
     (777, 2048, 777)],
)  # fmt: skip
def test_the_window_is_as_long_as_text_and_context_allow(text, tokens, count, context, length):
    tokens(count)
    found = quality.window(text, Endpoint("http://x", "m", "m", context), None)
    assert found.tokens == tuple(range(length))


@pytest.mark.parametrize(("count", "context"), [(255, None), (999, 256)], ids=["text", "context"])
def test_a_window_too_short_to_mean_anything_is_refused(text, tokens, count, context):
    tokens(count)
    with pytest.raises(BenchError, match="a window of 255 tokens is too short"):
        quality.window(text, Endpoint("http://x", "m", "m", context), None)


def test_an_arm_that_was_not_reached_is_not_available(capsys):
    results = Results(
        command=[], model="m", started_utc="t", environment={}, workloads={},
        arms={"sparse": {"attention_backend": "SPARSEK"}, "plain": {}, "other": {}},
        quality_window={"text": "t", "tokens": 9}, perplexity={"plain": 4.0, "other": 5.0},
    )  # fmt: skip
    column = columns(results)[0]
    cells = [column.show(results.quality(name)) for name in results.arms]
    # the first dense arm is what the others are compared with
    assert cells == ["n/a", "4.00", "5.00 (+25.0 %)"]
    report.show(results, Console(width=80))
