"""The serving benchmark, driven against a fake `vllm` command: no engine is started."""

import csv
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib.resources import files
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("matplotlib")
pytest.importorskip("prometheus_client")
pytest.importorskip("jinja2")
pytest.importorskip("rich")

from rich.console import Console  # noqa: E402

from vllm_sparsek.serving_bench import (  # noqa: E402
    cli,
    client,
    config,
    http,
    metrics,
    processes,
    prompts,
    report,
    server,
)
from vllm_sparsek.serving_bench.errors import BenchError, Interrupted  # noqa: E402
from vllm_sparsek.serving_bench.results import Results, Run  # noqa: E402

# what vLLM 0.32.0 exports after eight requests of two shared prefixes, less the other metrics
VLLM_METRICS = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 11243.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/model"} 0.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="org/model"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="org/model"} 0.0
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="org/model"} 4608.0
# HELP vllm:prefix_cache_queries_created Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="org/model"} 1.7951562886590784e+09
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="org/model"} 3072.0
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="org/model"} 0.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="org/model"} 4608.0
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 1536.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 3072.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 0.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="org/model"} 128.0
# HELP vllm:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="org/model"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="org/model"} 8.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="org/model"} 8.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="org/model"} 1.71
"""

# stands for `python -m vllm.entrypoints.cli.main`; what it does depends on the model's name
FAKE_VLLM = r"""
import json, os, subprocess, sys, threading, time
from urllib.request import Request, urlopen
from pathlib import Path
argv = sys.argv[1:]
def option(name, default=None):
    return argv[argv.index(name) + 1] if name in argv else default
def serve():
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    model = argv[1]
    print("Traceback (most recent call last):", flush=True)
    print("ModuleNotFoundError: No module named 'harmless'", flush=True)
    if "engine" in model:
        print("(EngineCore pid=7) ERROR 11-20 06:31:09 [core.py:72] ValueError: k must be positive")
        print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
        sys.exit(1)
    if "unknown" in model:
        print("pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig")
        print("  Value error, Invalid repository ID: 'unknown'. [type=value_error, input_value=1]")
        print("    For further information visit https://errors.pydantic.dev/", flush=True)
        sys.exit(1)
    if "late" in model and "sparsek" in argv:
        print("OSError: the second arm fails", flush=True)
        sys.exit(1)
    # stands for the engine: a grandchild that a kill of the server alone would leave behind
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[0]])
    if "hang" in model:
        time.sleep(600)
    counters = dict.fromkeys(
        ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries",
         "vllm:prefix_cache_hits", "vllm:num_preemptions") , 0)
    if "sparsek" in argv:
        counters |= dict.fromkeys(("sparsek:tokens_attended", "sparsek:context_tokens"), 0)
    lock = threading.Lock()
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def reply(self, body, status=200):
            self.send_response(status); self.end_headers(); self.wfile.write(body.encode())
        def do_GET(self):
            if self.path == "/metrics":
                with lock:
                    lines = [f'# TYPE {n}_total counter\n{n}_total{{engine="{e}"}} {v / 2}'
                             for n, v in counters.items() for e in (0, 1)]
                lines.append("# TYPE vllm:kv_cache_usage_perc gauge")
                lines.append('vllm:kv_cache_usage_perc{engine="0"} 0.5')
                self.reply("\n".join(lines) + "\n")
            elif self.path == "/v1/models":
                card = {"id": "served", "root": model, "max_model_len": 4096}
                self.reply(json.dumps({"data": [card]}))
            else:
                self.reply("")
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "served", body
            if "die-in-run" in model and body.get("measured"):
                print("RuntimeError: the engine fell over", flush=True)
                os._exit(3)
            if "refuses" in model:
                return self.reply("too long", 400)
            if not body.get("measured"):
                assert len(body["prompt"]) == 16, body
            with lock:
                for name, step in (
                    ("vllm:prompt_tokens", 100), ("vllm:generation_tokens", 10),
                    ("vllm:prefix_cache_queries", 100), ("vllm:prefix_cache_hits", 25),
                    ("sparsek:tokens_attended", 30), ("sparsek:context_tokens", 120),
                ):
                    if name in counters:
                        counters[name] += step
            self.reply("{}")
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
def bench():
    model = option("--model")
    if "slow-client" in model:
        print("benchmarking", flush=True)
        time.sleep(600)
    if "bad-client" in model:
        print("ValueError: the tokenizer is missing", flush=True)
        sys.exit(2)
    count = int(option("--num-prompts"))
    done = 0
    for _ in range(count):
        body = {"model": option("--served-model-name"), "measured": True}
        try:
            url = option("--base-url") + "/v1/completions"
            urlopen(Request(url, json.dumps(body).encode())).read()
            done += 1
        except OSError as error:
            print(error)
    if "half-client" in model:
        done //= 2
    result = {"duration": 2.0, "num_prompts": count, "completed": done, "failed": count - done,
              "total_input_tokens": 100 * done, "total_output_tokens": 10 * done}
    result |= {f"{s}_{m}_ms": 1.5 for s in ("mean", "p50", "p99") for m in ("ttft", "tpot", "itl")}
    Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(result))
serve() if argv[0] == "serve" else bench()
"""

WORKLOADS = """
workloads:
  small:
    dataset: random
    scales: {tiny: {input_len: 16, output_len: 4, num_prompts: 4, max_concurrency: 2, warmup: 1}}
  talk:
    dataset: multi_turn
    scales: {tiny: {conversations: 2, turns: 2, turn_words: 8, output_len: 4, max_concurrency: 1,
                    warmup: 0}}
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake_vllm.py"
    path.write_text(FAKE_VLLM)
    (tmp_path / "bench.yaml").write_text(WORKLOADS)
    yield path
    # whatever a test did, nothing it started is left; the dead may take a moment to be gone
    wait_until(lambda: not running(path), 2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(server, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "80")


def running(path):
    """Processes that have the fake's path on their command line, and are not zombies."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(path) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(url):
    try:
        http.get(f"{url}/health")
    except OSError:
        return False
    return True


def options(fake, *argv):
    parser = ArgumentParser()
    cli.add_arguments(parser)
    folder = fake.parent
    return parser.parse_args(
        ["--bench-config", f"{folder}/bench.yaml", "--scale=tiny", f"--output={folder}/out", *argv]
    )


def bench(fake, *argv):
    return cli.run(options(fake, *argv), vllm=(sys.executable, str(fake)))


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# configuration


def test_shipped_arms_and_workloads_are_valid_and_have_both_scales():
    bench = config.load()
    assert {"dense", "sparsek"} <= set(bench.arms)
    assert set(bench.workloads) == {"random", "shared-prefix", "long-context", "multi-turn"}
    for workload in bench.workloads:
        for scale in ("tiny", "gpu"):
            size = bench.size(workload, scale)
            assert size.prompt_len + size.output_len < {"tiny": 4096, "gpu": 65536}[scale]
    assert bench.arm("dense").dense
    assert not bench.arm("sparsek").dense


def test_shipped_sparsek_settings_are_settings_of_the_plugin():
    plugin = pytest.importorskip("vllm_sparsek.config")
    names = {field.name for field in dataclasses.fields(plugin.SparseKConfig)} | {"preset"}
    for name, arm in config.load().arms.items():
        settings = arm.sparsek or {}
        assert set(settings) <= names, name
        if "preset" in settings:
            assert files("vllm_sparsek.configs").joinpath(f"{settings['preset']}.yaml").is_file()
        else:
            plugin.SparseKConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm: {}", "top level: unknown key 'arm'; did you mean 'arms'?"),
        (
            "arms: {a: {atention_backend: x}}",
            "arms.a: unknown key 'atention_backend'; did you mean",
        ),
        (
            "workloads: {w: {dataset: random, scales: {s: {inputlen: 3}}}}",
            "workloads.w.random.scales.s: unknown key 'inputlen'; did you mean 'input_len'?",
        ),
        ("workloads: {w: {dataset: nope, scales: {}}}", "'prefix_repetition'"),
        ("arms: {a: {sparsek: {k: 3}}}", "need `attention_backend: sparsek`"),
        ("arms: [", "not valid YAML"),
        (
            "workloads: {w: {dataset: random, scales: {s: {input_len: 0, output_len: 1,"
            " num_prompts: 1, max_concurrency: 1}}}}",
            "greater than 0",
        ),
        (
            "workloads: {w: {dataset: prefix_repetition, scales: {s: {num_prefixes: 3, prefix_len:"
            " 1, suffix_len: 1, output_len: 1, num_prompts: 4, max_concurrency: 1}}}}",
            "multiple of num_prefixes",
        ),
    ],
    ids=["top", "arm", "size", "dataset", "settings", "syntax", "value", "prefixes"],
)
def test_a_faulty_configuration_is_refused_with_the_place_and_the_nearest_key(text, message):
    with pytest.raises(BenchError) as error:
        config.parse(text, "file.yaml")
    assert str(error.value).startswith("file.yaml: ")
    assert message in str(error.value)


def test_an_unknown_arm_workload_or_scale_names_the_nearest():
    bench = config.load()
    with pytest.raises(BenchError, match="no arm 'sparsk'; did you mean 'sparsek'"):
        bench.arm("sparsk")
    with pytest.raises(BenchError, match="did you mean 'multi-turn'"):
        bench.size("multiturn", "tiny")
    with pytest.raises(BenchError, match="no scale 'huge'; valid: tiny, gpu"):
        bench.size("random", "huge")


def test_a_file_of_the_user_replaces_and_adds_by_name(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("arms: {sparsek: {attention_backend: sparsek, sparsek: {k: 7}}, mine: {}}")
    arms = config.load(path).arms
    assert arms["sparsek"].sparsek == {"k": 7}
    assert {"mine", "dense"} <= set(arms)
    with pytest.raises(BenchError, match="cannot read"):
        config.load(tmp_path / "absent.yaml")


def test_an_arm_becomes_vllm_arguments():
    arm = config.Arm(attention_backend="sparsek", sparsek={"k": 0.25}, server_args=["--seed=1"])
    assert server.serve_command(["vllm"], "m", arm, 81, ["--max-model-len=9"]) == [
        "vllm", "serve", "m", "--host", "127.0.0.1", "--port", "81",
        "--attention-backend", "sparsek", "--additional-config", '{"sparsek": {"k": 0.25}}',
        "--seed=1", "--max-model-len=9",
    ]  # fmt: skip
    assert config.Arm().vllm_args() == []


# metrics


def test_metrics_of_a_real_server_are_read_and_foreign_ones_dropped():
    snapshot = metrics.parse(VLLM_METRICS)
    assert snapshot.total("vllm:prompt_tokens_total") == 4608
    assert snapshot.total(metrics.PROMPT_TOKENS_BY_SOURCE, source="local_compute") == 1536
    assert snapshot.highest(metrics.KV_USAGE) == 0.0
    assert snapshot.total("vllm:absent_total") is None
    assert not any(name.startswith("python") for name in snapshot.samples)


def test_rates_are_growth_over_the_duration_and_the_hit_rate_is_hits_over_queries():
    values = metrics.derive(metrics.Snapshot({}), metrics.parse(VLLM_METRICS), 4.0, dense=True)
    assert values["prompt_tokens_per_s"] == 1152
    assert values["prefill_tokens_per_s"] == 384
    assert values["generation_tokens_per_s"] == 32
    assert values["kv_hit_rate"] == pytest.approx(2 / 3)
    assert values["preemptions"] == 0
    assert values["density"] == 1.0
    assert values["dense_step_share"] is None


def test_nothing_measured_is_not_available_rather_than_zero():
    same = metrics.parse(VLLM_METRICS)
    values = metrics.derive(same, same, 4.0, dense=False)
    assert values["kv_hit_rate"] is None
    assert values["density"] is None
    assert values["prompt_tokens_per_s"] == 0
    empty = metrics.Snapshot({})
    assert set(metrics.derive(empty, empty, 4.0, dense=False).values()) == {None}
    # a server that was restarted in between
    reset = metrics.parse(VLLM_METRICS.replace("} 4608.0", "} 8.0"))
    assert metrics.derive(same, reset, 4.0, dense=False)["prompt_tokens"] is None


def test_counters_are_summed_over_engines():
    def text(attended, context):
        return (
            "# TYPE sparsek:tokens_attended_total counter\n"
            f'sparsek:tokens_attended_total{{engine="0"}} {attended}\n'
            f'sparsek:tokens_attended_total{{engine="1"}} {attended}\n'
            "# TYPE sparsek:context_tokens_total counter\n"
            f'sparsek:context_tokens_total{{engine="0"}} {context}\n'
            f'sparsek:context_tokens_total{{engine="1"}} {context}\n'
        )

    before, after = metrics.parse(text(100, 100)), metrics.parse(text(150, 300))
    assert metrics.derive(before, after, 1.0, dense=False)["density"] == 0.25


# the client


def test_the_client_command_fixes_lengths_and_asks_for_the_percentiles(tmp_path):
    endpoint = server.Endpoint("http://h:1", "served", "org/model", None)
    size = config.load().size("shared-prefix", "tiny")
    command = client.bench_command(["vllm"], endpoint, size, tmp_path / "r.json", seed=5)
    assert command[:3] == ["vllm", "bench", "serve"]
    pairs = dict(itertools.pairwise(command))
    assert pairs["--model"] == "org/model"
    assert pairs["--served-model-name"] == "served"
    assert pairs["--dataset-name"] == "prefix_repetition"
    assert pairs["--prefix-repetition-num-prefixes"] == "2"
    assert pairs["--seed"] == "5"
    assert pairs["--ready-check-timeout-sec"] == "0"
    assert pairs["--percentile-metrics"] == "ttft,tpot,itl"
    assert pairs["--metric-percentiles"] == "50,99"
    assert pairs["--result-filename"] == "r.json"
    assert {"--ignore-eos", "--save-result"} <= set(command)
    assert "--metadata" not in command
    more = size.model_copy(update={"client_args": ["--top-k", "1"], "request_rate": 2.5})
    command = client.bench_command(["vllm"], endpoint, more, tmp_path / "r.json", seed=5)
    assert command[-4:] == ["--request-rate", "2.5", "--top-k", "1"]


def test_vllm_accepts_every_option_of_the_client_command(tmp_path):
    pytest.importorskip("vllm")
    known = set()
    import vllm

    folder = Path(vllm.__file__).parent / "benchmarks"
    for source in (folder / "serve.py", folder / "datasets" / "datasets.py"):
        known |= set(re.findall(r'"(--[a-z][a-z-]+)"', source.read_text()))
    endpoint = server.Endpoint("http://h:1", "served", "org/model", None)
    bench = config.load()
    for workload in bench.workloads:
        size = bench.size(workload, "tiny")
        command = client.bench_command(["vllm"], endpoint, size, tmp_path / "r.json", seed=1)
        assert {word for word in command if word.startswith("--")} <= known


def test_each_turn_extends_the_turn_before_and_conversations_share_nothing(tmp_path):
    size = config.load().size("multi-turn", "tiny")
    texts = prompts.conversations(size, seed=1)
    assert len(texts) == size.num_prompts
    for before, after in zip(texts, texts[size.conversations :], strict=False):
        assert after.startswith(before)
    assert len({text[:100] for text in texts}) == size.conversations
    assert len(texts[-1].split()) == pytest.approx(size.prompt_words, abs=2 * size.turns)
    assert texts == prompts.conversations(size, seed=1) != prompts.conversations(size, seed=2)
    prompts.write_jsonl(texts, 4, tmp_path / "x.jsonl")
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"prompt": texts[3], "output_tokens": 4}


def test_a_workload_longer_than_the_context_is_refused_before_anything_runs():
    endpoint = server.Endpoint("http://h:1", "m", "m", 1024)
    size = config.load().size("long-context", "tiny")
    with pytest.raises(BenchError, match="needs a context of 2080 tokens, the server allows 1024"):
        client.check_length("long-context", size, endpoint)


# whole runs against the fake


def test_a_run_over_two_arms_reports_json_csv_png_html_and_a_table(fake, capsys):
    assert bench(fake, "org/<model>", "--workloads=small,talk", "--repeat=2") == 0
    out = fake.parent / "out"
    data = json.loads((out / "results.json").read_text())
    assert data["error"] is None
    assert [(r["arm"], r["workload"], r["repeat"]) for r in data["runs"]] == [
        (arm, workload, repeat)
        for arm in ("dense", "sparsek") for workload in ("small", "talk") for repeat in (0, 1)
    ]  # fmt: skip
    dense, sparse = data["runs"][0], data["runs"][4]
    # 4 requests of 100 + 10 tokens in 2 s; the warm-up is not counted
    assert dense["metrics"]["prompt_tokens_per_s"] == 200
    assert dense["metrics"]["generation_tokens_per_s"] == 20
    assert dense["metrics"]["kv_hit_rate"] == 0.25
    assert dense["metrics"]["density"] == 1.0
    assert sparse["metrics"]["density"] == 0.25
    assert sparse["metrics"]["kv_usage_peak"] == 0.5
    assert sparse["metrics"]["itl_p99"] == 1.5
    # the arms are asked the same, the repeats are not
    assert dense["seed"] == sparse["seed"] != data["runs"][1]["seed"]
    assert sparse["server_command"][-2:] == ["--attention-backend", "sparsek"]
    assert sparse["server_command"][0] == "python"
    assert sparse["vllm_result"]["completed"] == 4
    assert set(data["environment"]["versions"]) == {"vllm", "torch", "triton", "vllm-sparsek"}
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8
    assert float(rows[0]["prompt_tokens_per_s"]) == 200
    assert rows[0]["model"] == "org/<model>"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "org/&lt;model&gt;" in page and "<model>" not in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    shown = capsys.readouterr().out
    assert "prompt" in shown and "sparsek" in shown and "report.html" in shown
    table = [line for line in shown.splitlines() if "tok/s" in line or line.startswith(" small")]
    assert table and max(map(len, table)) <= 80


def test_an_endpoint_that_runs_already_is_measured_and_left_running(fake):
    port = server.free_port()
    url = f"http://127.0.0.1:{port}"
    endpoint = subprocess.Popen(
        [sys.executable, str(fake), "serve", "org/m", "--port", str(port)], start_new_session=True
    )
    try:
        wait_until(lambda: answers(url))
        assert bench(fake, f"--base-url={url}/v1/", "--workloads=small") == 0
        assert endpoint.poll() is None
    finally:
        os.killpg(endpoint.pid, signal.SIGKILL)
        endpoint.wait()
    run = json.loads((fake.parent / "out" / "results.json").read_text())["runs"][0]
    assert run["arm"] == "endpoint"
    assert run["server_command"] is None
    assert run["metrics"]["density"] is None
    assert run["metrics"]["prompt_tokens_per_s"] == 200
    assert run["client_command"][run["client_command"].index("--model") + 1] == "org/m"


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("unknown", "died while starting (exit status 1): Invalid repository ID: 'unknown'."),
        ("engine", "died while starting (exit status 1): ValueError: k must be positive"),
        ("die-in-run", "died during the run (exit status 3): RuntimeError: the engine fell over"),
    ],
)
def test_a_server_that_dies_is_reported_by_its_cause_in_one_line_with_the_log(
    fake, capsys, model, cause
):
    assert bench(fake, model, "--workloads=small") == 1
    captured = capsys.readouterr()
    log = fake.parent / "out" / "logs" / "server-dense.log"
    assert captured.err.strip() == (
        f"error: arm 'dense', model {model!r}: the server {cause} [log: {log}]"
    )
    assert "  | " in captured.out, "the last lines of the log are shown"


def test_finished_arms_are_kept_when_a_later_arm_fails(fake, capsys):
    assert bench(fake, "late", "--workloads=small") == 1
    assert "arm 'sparsek', model 'late': the server died while starting" in last_line(capsys)
    out = fake.parent / "out"
    data = json.loads((out / "results.json").read_text())
    assert [run["arm"] for run in data["runs"]] == ["dense"]
    assert "the second arm fails" in data["error"]
    assert "the second arm fails" in (out / "report.html").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 2


def test_a_client_that_fails_is_reported_with_its_own_log(fake, capsys):
    assert bench(fake, "bad-client", "--arms=dense", "--workloads=small") == 1
    line = last_line(capsys)
    assert "the client failed (exit status 2): ValueError: the tokenizer is missing" in line
    assert "client-dense-small-0.log" in line


def test_failed_requests_are_reported_and_make_the_run_fail(fake, capsys):
    assert bench(fake, "half-client", "--arms=dense", "--workloads=small") == 1
    captured = capsys.readouterr()
    assert "2 of 4 requests failed" in captured.out
    assert "dense !" in captured.out
    assert captured.err.strip().startswith("error: 2 requests failed")


def test_a_server_that_never_answers_times_out(fake, capsys):
    assert bench(fake, "hang", "--arms=dense", "--startup-timeout=1") == 1
    assert "was not ready after 1 s, see --startup-timeout" in last_line(capsys)


def test_a_port_in_use_is_refused_before_a_server_is_started(fake, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert bench(fake, "m", f"--port={port}") == 1
    assert f"port {port} cannot be used" in last_line(capsys)
    assert not (fake.parent / "out" / "logs").exists()


def test_what_a_server_says_of_a_refused_warm_up_request_is_shown(fake, capsys):
    assert bench(fake, "refuses", "--arms=dense", "--workloads=small") == 1
    line = last_line(capsys)
    assert "a warm-up request failed: HTTP Error 400: Bad Request: too long" in line


def test_an_endpoint_that_does_not_answer_is_named(fake, capsys):
    url = f"http://127.0.0.1:{server.free_port()}"
    assert bench(fake, f"--base-url={url}") == 1
    assert f"no OpenAI-compatible endpoint answers at {url}" in last_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a MODEL"),
        (["m", "--arms=dens"], "did you mean 'dense'"),
        (["m", "--scale=big"], "no scale 'big'"),
        (["--base-url=http://x", "--port=1"], "starts no server"),
        (["--base-url=http://x", "--arms=a,b"], "one name"),
    ],
    ids=["model", "arm", "scale", "port", "arms"],
)
def test_options_that_do_not_fit_end_in_one_line(fake, capsys, argv, message):
    assert bench(fake, *argv) == 1
    captured = capsys.readouterr().err.strip()
    assert message in captured and len(captured.splitlines()) == 1


@pytest.mark.parametrize("model", ["hang", "slow-client"], ids=["starting", "running"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_leaves_no_process_behind(fake, model, signum):
    code = (
        "import sys; from tests_argv import argv, fake; from argparse import ArgumentParser\n"
        "from vllm_sparsek.serving_bench import cli\n"
        "parser = ArgumentParser(); cli.add_arguments(parser)\n"
        "sys.exit(cli.run(parser.parse_args(argv), vllm=(sys.executable, fake)))\n"
    )
    folder = fake.parent
    argv = [model, "--arms=dense", "--workloads=small", "--scale=tiny"]
    argv += [f"--bench-config={folder}/bench.yaml", f"--output={folder}/out"]
    (folder / "tests_argv.py").write_text(f"argv = {argv!r}\nfake = {str(fake)!r}\n")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    # server and engine, and the client
    wanted = 2 if model == "hang" else 3
    wait_until(lambda: len(running(fake)) >= wanted)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert err.strip() == f"error: stopped by signal {int(signum)}"
    wait_until(lambda: not running(fake), 2)


def test_a_signal_while_a_child_is_being_started_waits_until_the_child_is_known(tmp_path):
    marker = tmp_path / "child.py"
    marker.write_text("import time; time.sleep(600)")
    real = subprocess.Popen

    def popen(*args, **kwargs):
        child = real(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return child

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(subprocess, "Popen", popen)
        with processes.interruptible():
            processes.Child([sys.executable, str(marker)], tmp_path / "log")
    assert stop.value.signum == signal.SIGTERM
    wait_until(lambda: not running(marker), 2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_server_that_ignores_the_polite_signal_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "stubborn.py"
    marker.write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.Popen([sys.executable, __file__, 'engine'])\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    child = processes.Child([sys.executable, str(marker)], log)
    wait_until(lambda: log.read_text().count("up") == 2)
    assert len(running(marker)) == 2
    child.stop(grace=0.2)
    child.stop()
    wait_until(lambda: not running(marker), 2)


def test_the_cause_is_found_behind_vllm_prefixes_and_generic_echoes(tmp_path):
    log = tmp_path / "log"
    log.write_text("vllm: error: argument --port: invalid int value: 'x'\n")
    assert processes.cause(log) == "vllm: error: argument --port: invalid int value: 'x'"
    log.write_text("(APIServer pid=3) RuntimeError: Engine core initialization failed. See above\n")
    assert processes.cause(log) == "RuntimeError: Engine core initialization failed. See above"
    log.write_text("INFO 11-20 06:31:09 [model.py:1] an Error: in the middle\nKilled\n")
    assert processes.cause(log) is None
    assert processes.tail(log, 1) == ["Killed"]
    assert processes.cause(tmp_path / "absent") is None


# reports


def results(metric_values, failed=0):
    runs = [
        Run(
            arm=arm, workload="w", scale="tiny", repeat=repeat, seed=1, started_utc="t",
            duration_s=1.0, completed=1, failed=failed,
            metrics={"prompt_tokens_per_s": value, "generation_tokens_per_s": None,
                     "kv_hit_rate": None, "density": None},
            client_command=["python", "a b"], server_command=None, vllm_result={},
        )
        for arm, values in metric_values.items()
        for repeat, value in enumerate(values)
    ]  # fmt: skip
    return Results(
        command=["x"], model="m", started_utc="t", environment={"device": "cpu", "versions": {}},
        arms={"a": {}}, workloads={"w": {}}, runs=runs,
    )  # fmt: skip


def test_the_summary_takes_medians_and_keeps_what_is_not_available():
    (row,) = results({"a": [1.0, 9.0, 2.0]}).summary()
    assert row["prompt_tokens_per_s"] == 2.0
    assert row["kv_hit_rate"] is None
    assert row["repeats"] == 3


def test_reports_are_written_when_hardly_anything_is_available(tmp_path, capsys):
    measured = results({"a": [None], "<b>": [None]})
    report.save_all(measured, tmp_path)
    report.show(measured, Console(width=60))
    assert "n/a" in capsys.readouterr().out
    assert "&lt;b&gt;" in (tmp_path / "report.html").read_text()
    assert "&#39;a b&#39;" in (tmp_path / "report.html").read_text()
