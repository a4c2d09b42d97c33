"""The command from options to report, with a fake engine: resuming, errors, Ctrl-C."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import threading
import time

import psutil
import pytest

from vllm_sparsek.evaluation import cli, run

# answers right when dense, else every second one; waits or dies where a file tells it to
FAKE = r"""
import json, sys, time
from pathlib import Path
here = Path(__file__).parent
spec = json.loads(Path(sys.argv[1]).read_text())
settings = spec["llm"].get("additional_config", {}).get("sparsek")
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(spec["llm"]) + "\n")
for job in spec["jobs"]:
    if (here / "hang").exists():
        (here / "hanging").touch()
        time.sleep(60)
    if (here / "die").exists() and settings:
        if (here / "linger").exists() and settings["scorer"] == "random":
            time.sleep(60)
        print("ValueError: the scorer was fitted to another model")
        sys.exit(3)
    if (here / "together").exists():
        # goes on once that many engines run
        started = time.monotonic()
        while len((here / "calls").read_text().splitlines()) < 3:
            if time.monotonic() - started > 20:
                sys.exit("alone")
            time.sleep(0.01)
    prompts = json.loads(Path(job["prompts"]).read_text())
    if job["kind"] == "answers":
        found = [
            " ".join(p["references"]) if settings is None or i % 2 == 0 else "no idea"
            for i, p in enumerate(prompts)
        ]
    else:
        nll = 2.0 if settings is None else 2.1
        found = [
            {"nll": nll * 100, "tokens": 100, "nll_last": nll * 25, "tokens_last": 25}
            for _ in prompts
        ]
    counts = {"tokens_attended": 60, "context_tokens": 100,
              "decode_tokens_attended": 30, "decode_context_tokens": 100}
    record = {"id": job["id"], job["kind"]: found, "counters": counts, "seconds": 1.0}
    with open(spec["results"], "a") as out:
        out.write(json.dumps(record) + "\n")
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def evaluate(tmp_path, model_dir):
    """Run the command with the fake engine; returns its exit status."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)

    def start(*options, model=model_dir):
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        arguments = [
            model, "--scorers=keydiff,random", "--budgets=0.5", "--lengths=512", "--samples=4",
            "--windows=2", "--tasks=perplexity,passkey,multi-value",
            f"--output={tmp_path / 'out'}", *options,
        ]  # fmt: skip
        return cli.run(parser.parse_args(arguments), [sys.executable, str(worker)])

    return start


def calls(tmp_path):
    path = tmp_path / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_all_cells_run_dense_first_and_are_reported(evaluate, tmp_path, capsys):
    assert evaluate() == 0
    engines = calls(tmp_path)
    assert len(engines) == 1 + 2 * 3
    assert "additional_config" not in engines[0]
    assert all(engine["attention_backend"] == "sparsek" for engine in engines[1:])
    settings = [engine["additional_config"]["sparsek"] for engine in engines[1:4]]
    assert [(s["prefill"], s.get("dense_until")) for s in settings] == [
        ("sparse", 0), ("dense", 0), ("sparse", 512),
    ]  # fmt: skip
    assert {s["k"] + s["window"] + s["sinks"] for s in settings} == {256}
    out = tmp_path / "out"
    for name in ("results.json", "results.csv", "report.html", "perplexity-512.png",
                 "ruler-512.png", "worst-512.png"):  # fmt: skip
        assert (out / name).stat().st_size
    rows = list(csv.DictReader((out / "results.csv").open()))
    (row,) = [
        r for r in rows if (r["arm"], r["column"], r["task"]) == ("random", "decode", "passkey")
    ]
    assert (row["value"], row["dense"], row["relative"], row["n"]) == ("0.5", "1.0", "0.5", "4")
    assert (row["density"], row["decode_density"]) == ("0.6", "0.3")
    # only where prompts are read sparsely can their perplexity show it
    assert {r["column"] for r in rows if r["measure"].startswith("increase")} == {"all"}
    said = capsys.readouterr().out
    assert "random 50% question 512: passkey" in said
    assert "10.52" in said
    assert max(map(len, said.splitlines()[-20:-6])) <= 80


def test_engines_at_the_same_time_find_the_same(evaluate, tmp_path):
    (tmp_path / "together").touch()
    assert evaluate("--engines=3") == 0
    rows = (tmp_path / "out" / "results.csv").read_text()
    assert evaluate("--output", str(tmp_path / "one by one")) == 0
    assert (tmp_path / "one by one" / "results.csv").read_text() == rows


def test_when_one_engine_dies_the_others_are_stopped(evaluate, tmp_path, capsys):
    (tmp_path / "die").touch()
    (tmp_path / "linger").touch()
    began = time.monotonic()
    assert evaluate("--engines=7") == 1
    assert "fitted to another model" in capsys.readouterr().err
    assert not psutil.Process().children(recursive=True)
    assert time.monotonic() - began < 30


def test_the_same_command_runs_nothing_twice(evaluate, tmp_path):
    assert evaluate() == 0
    before = (tmp_path / "out" / "results.csv").read_text()
    done = len(calls(tmp_path))
    assert evaluate() == 0
    assert len(calls(tmp_path)) == done
    assert (tmp_path / "out" / "results.csv").read_text() == before


def test_further_arms_and_tasks_are_added_to_what_is_there(evaluate, tmp_path):
    assert evaluate() == 0
    done = len(calls(tmp_path))
    assert evaluate("--scorers=keydiff,random,knorm") == 0
    assert len(calls(tmp_path)) == done + 3


def test_half_a_line_left_by_an_interrupt_is_dropped(evaluate, tmp_path):
    assert evaluate() == 0
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    done = len(calls(tmp_path))
    assert evaluate() == 0
    assert len(calls(tmp_path)) == done + 1
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [
        json.loads(line)["id"] for line in lines
    ]


def test_an_engine_that_dies_ends_with_its_reason_and_keeps_results(evaluate, tmp_path, capsys):
    (tmp_path / "die").touch()
    assert evaluate() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for word in ("keydiff 50% all 512", "fitted to another model", "keydiff-50-all-512.log"):
        assert word in error
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    (tmp_path / "die").unlink()
    assert evaluate() == 0


def test_an_engine_that_hangs_is_ended_after_the_timeout(evaluate, tmp_path, capsys):
    (tmp_path / "hang").touch()
    assert evaluate("--timeout=1") == 1
    assert "no result after 1 s, see --timeout" in capsys.readouterr().err


def test_ctrl_c_leaves_no_engine_and_says_how_to_go_on(evaluate, tmp_path, capsys):
    import psutil

    (tmp_path / "hang").touch()

    def interrupt():
        while not (tmp_path / "hanging").exists():
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    assert evaluate() == 130
    assert "the same command goes on" in capsys.readouterr().err
    running = [" ".join(process.info["cmdline"] or []) for process in
               psutil.process_iter(["cmdline"])]  # fmt: skip
    assert not any(str(tmp_path / "worker.py") in line for line in running)


def test_a_scorer_that_a_column_cannot_show_is_marked(evaluate, tmp_path, capsys, monkeypatch):
    from vllm_sparsek.evaluation import plan

    resolve = plan.SparseKConfig.resolve

    def refuse(additional, env):
        if additional["scorer"] == "knorm" and additional["prefill"] == "sparse":
            raise plan.SparseKConfigError("knorm reads prompts densely only")
        return resolve(additional=additional, env=env)

    monkeypatch.setattr(plan.SparseKConfig, "resolve", refuse)
    assert evaluate("--scorers=knorm") == 0
    assert len(calls(tmp_path)) == 2
    said = capsys.readouterr().out
    assert "n/a: knorm, all: knorm reads prompts densely only" in said
    assert "n/a: knorm, question" in said


def test_the_oracle_gets_one_request_at_a_time_and_only_tasks_with_needles(evaluate, tmp_path):
    assert evaluate("--scorers=oracle", "--tasks=perplexity,passkey,frequent-words") == 0
    rows = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert {row["task"] for row in rows if row["arm"] == "oracle"} == {"passkey"}
    engine = calls(tmp_path)[-1]
    assert (engine["max_num_seqs"], engine["enable_prefix_caching"]) == (1, False)


ERRORS = {
    "text": (["--text", "no/such.txt"], ["--text no/such.txt cannot be read"]),
    "task": (["--tasks", "paskey"], ["--tasks paskey: unknown", "'passkey'"]),
    "column": (["--columns", "question,al"], ["--columns al: unknown", "'all'"]),
    "split": (["--split", "train"], ["--split train: unknown", "test, tune"]),
    "scorer": (["--scorers", "keydif"], ["scorer='keydif' cannot be used", "'keydiff'"]),
    "setting": (["--scorers", "knorm:windw=3"], ["windw=3 cannot be used", "'window'"]),
    "form": (["--scorers", "knorm:window"], ["'window' is not of the form key=value"]),
    "file": (["--scorers", "learned=no.safetensors"], ["learned=no.safetensors: no such file"]),
    "no file": (["--scorers", "learned"], ["learned needs its file"]),
    "budget": (["--budgets", "0.01"], ["nothing to select", "--budgets or --lengths"]),
    "length": (["--lengths", "500"], ["--lengths 500 is not a multiple of 64"]),
    "too long": (["--lengths", "8192"], ["the model's context has 8192", "fits is 8064"]),
    "short text": (["--text", "SHORT"], ["the text short has", "lower --lengths"]),
    "engine": (["--engine-arg", "dtype"], ["--engine-arg dtype is not of the form KEY=VALUE"]),
}


@pytest.mark.parametrize(("options", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_what_cannot_be_run_is_one_line_before_an_engine_starts(
    options, words, evaluate, tmp_path, capsys
):
    (tmp_path / "short.txt").write_text("This sentence is too short for a window. " * 3)
    options = [str(tmp_path / "short.txt") if o == "SHORT" else o for o in options]
    assert evaluate(*options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not calls(tmp_path)


def test_a_model_that_is_not_there_is_one_line(evaluate, tmp_path, capsys):
    assert evaluate(model=str(tmp_path / "none")) == 1
    assert "cannot be loaded" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_without_chat_template_is_asked_to_leave_the_conversation_out(
    evaluate, tmp_path, model_dir, capsys
):
    import shutil
    from pathlib import Path

    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_dir) / name, plain)
    assert evaluate("--tasks=conversation", model=str(plain)) == 1
    assert "no chat template: leave this task out with --tasks" in capsys.readouterr().err
