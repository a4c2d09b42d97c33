"""Drive an endpoint with vLLM's own client, `vllm bench serve`, in a subprocess."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vllm_sparsek.serving_bench import http, prompts
from vllm_sparsek.serving_bench.config import (
    AnySize,
    MultiTurnSize,
    PrefixSize,
    RandomSize,
)
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.processes import Child, wait
from vllm_sparsek.serving_bench.server import Endpoint, died

LATENCIES = ("ttft", "tpot", "itl")
STATISTICS = ("mean", "p50", "p99")
POLL_SECONDS = 0.2
WARMUP_TIMEOUT_SECONDS = 1800.0
# ids that every vocabulary has, toys included
WARMUP_TOKENS = range(10, 250)
# a client may fail because its server is dying, which takes a moment to be seen
DEATH_SECONDS = 1.0


def dataset_args(size: AnySize, dataset: Path, seed: int) -> list[str]:
    """Return the arguments that choose the prompts. `dataset`: file to write, if one is needed."""
    if isinstance(size, RandomSize):
        return [
            "--dataset-name", "random",
            "--random-input-len", str(size.input_len),
            "--random-output-len", str(size.output_len),
            "--random-range-ratio", str(size.range_ratio),
        ]  # fmt: skip
    if isinstance(size, PrefixSize):
        return [
            "--dataset-name", "prefix_repetition",
            "--prefix-repetition-num-prefixes", str(size.num_prefixes),
            "--prefix-repetition-prefix-len", str(size.prefix_len),
            "--prefix-repetition-suffix-len", str(size.suffix_len),
            "--prefix-repetition-output-len", str(size.output_len),
        ]  # fmt: skip
    prompts.write_jsonl(prompts.conversations(size, seed), size.output_len, dataset)
    # unshuffled and without a template, or a later turn would not extend the one before it
    return [
        "--dataset-name", "custom",
        "--dataset-path", str(dataset),
        "--custom-output-len", str(size.output_len),
        "--disable-shuffle",
        "--skip-chat-template",
    ]  # fmt: skip


def bench_command(
    vllm: Sequence[str], endpoint: Endpoint, size: AnySize, result: Path, seed: int
) -> list[str]:
    """Return the client's command line; it writes its result to `result`."""
    command = [
        *vllm, "bench", "serve",
        "--backend", "openai",
        "--base-url", endpoint.base_url,
        "--endpoint", "/v1/completions",
        "--model", endpoint.tokenizer,
        "--served-model-name", endpoint.model,
        *dataset_args(size, result.with_suffix(".jsonl"), seed),
        "--num-prompts", str(size.num_prompts),
        "--max-concurrency", str(size.max_concurrency),
        "--seed", str(seed),
        "--temperature", "0",
        # fixed output lengths: an arm must not look fast because it stops early
        "--ignore-eos",
        "--percentile-metrics", ",".join(LATENCIES),
        "--metric-percentiles", "50,99",
        # the client's ready check would send the first prompt twice, a prefix-cache hit
        "--ready-check-timeout-sec", "0",
        "--disable-tqdm",
        "--save-result",
        "--result-dir", str(result.parent),
        "--result-filename", result.name,
    ]  # fmt: skip
    if size.request_rate is not None:
        command += ["--request-rate", str(size.request_rate)]
    return command + size.client_args


def warm_up(endpoint: Endpoint, size: AnySize, seed: int, server: Child | None) -> None:
    """Send `size.warmup` requests of the workload's length, so that kernels are compiled.

    Random token ids, so that the length is exact and no measured prompt finds a prefix cached.
    Raises BenchError on failure.
    """
    rng = Random(seed)
    todo = [rng.choices(WARMUP_TOKENS, k=size.prompt_len) for _ in range(size.warmup)]
    errors: list[BaseException] = []

    def send() -> None:
        while todo and not errors:
            body = {
                "model": endpoint.model,
                "prompt": todo.pop(),
                "max_tokens": size.output_len,
                "temperature": 0,
                "ignore_eos": True,
            }
            try:
                http.post(f"{endpoint.base_url}/v1/completions", body, WARMUP_TIMEOUT_SECONDS)
            except http.HTTP_ERRORS as error:
                errors.append(error)

    # daemons, since an executor's threads would hold up our exit for as long as a request takes
    workers = min(size.max_concurrency, size.warmup)
    threads = [threading.Thread(target=send, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        if server is not None and wait(server, DEATH_SECONDS):
            raise died(server, "the server died during the warm-up")
        raise BenchError(f"a warm-up request failed: {errors[0]}")


@dataclass(frozen=True)
class ClientResult:
    """What vLLM's client measured: seconds, tokens, and latencies in milliseconds."""

    duration_s: float
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    latency_ms: dict[str, float | None]
    raw: dict[str, Any]


def parse(raw: dict[str, Any]) -> ClientResult:
    """Read the client's result. Raises BenchError if it is not one, or if no request succeeded."""
    try:
        result = ClientResult(
            duration_s=float(raw["duration"]),
            completed=int(raw["completed"]),
            failed=int(raw.get("failed", raw["num_prompts"] - raw["completed"])),
            input_tokens=int(raw["total_input_tokens"]),
            output_tokens=int(raw["total_output_tokens"]),
            latency_ms={
                f"{latency}_{statistic}": raw.get(f"{statistic}_{latency}_ms")
                for latency in LATENCIES
                for statistic in STATISTICS
            },
            raw=raw,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"the client's result lacks or garbles a field: {error!r}") from error
    if result.completed == 0 or result.duration_s <= 0:
        raise BenchError(f"none of the {result.failed} requests succeeded")
    return result


def run(command: Sequence[str], result: Path, log: Path, server: Child | None) -> ClientResult:
    """Run the client to its end, giving up at once if the server dies.

    Raises BenchError if either fails, naming the log that says why.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    try:
        client = Child(command, log)
    except OSError as error:
        raise BenchError(f"cannot start {command[0]}: {error}") from error
    with client:
        while not wait(client, POLL_SECONDS):
            if server is not None and server.returncode is not None:
                raise died(server, "the server died during the run")
        if server is not None and client.returncode != 0 and wait(server, DEATH_SECONDS):
            raise died(server, "the server died during the run")
        if client.returncode != 0:
            raise died(client, "the client failed")
    try:
        return parse(json.loads(result.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BenchError(f"the client wrote no readable result: {error} [log: {log}]") from error
    except BenchError as error:
        if server is not None and wait(server, DEATH_SECONDS):
            raise died(server, "the server died during the run") from error
        raise BenchError(f"{error} [log: {log}]") from error


def check_length(workload: str, size: AnySize, endpoint: Endpoint) -> None:
    """Raise BenchError if the workload's longest request exceeds the endpoint's context."""
    need = size.prompt_len + size.output_len
    if endpoint.max_model_len is not None and need > endpoint.max_model_len:
        about = "about " if isinstance(size, MultiTurnSize) else ""
        raise BenchError(
            f"workload {workload!r} needs a context of {about}{need} tokens, the server allows"
            f" {endpoint.max_model_len}; see --scale, --workloads and --server-arg"
        )
