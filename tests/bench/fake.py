"""A fake `vllm` command and what the benchmark's tests share around it."""

import sys
import time
from argparse import ArgumentParser

import psutil

from vllm_sparsek.serving_bench import (
    cli,
    http,
)

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
            if self.path == "/tokenize":
                if "no-tokenize" in model:
                    return self.reply("Not Found", 404)
                return self.reply(json.dumps({"tokens": [ord(c) % 100 for c in body["prompt"]]}))
            if "prompt_logprobs" in body:
                if "no-logprobs" in model:
                    return self.reply(json.dumps({"choices": [{"prompt_logprobs": None}]}))
                if "dies-of-quality" in model:
                    print("RuntimeError: out of memory", flush=True)
                    os._exit(3)
                ids = body["prompt"]
                assert len(ids) < 4096 and body["max_tokens"] == 1, (len(ids), body["max_tokens"])
                # the half that is read first would be worse
                half = len(ids) - len(ids) // 2
                good = -2.02 if "sparsek" in argv else -2.0
                steps = [None] + [{str(t): {"logprob": good if i >= half else -9.0}}
                                  for i, t in enumerate(ids) if i]
                with lock:
                    counters["vllm:prompt_tokens"] += len(ids)
                return self.reply(json.dumps({"choices": [{"prompt_logprobs": steps}]}))
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
