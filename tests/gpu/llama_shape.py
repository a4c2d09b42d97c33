"""Llama-3.1-8B shape with dummy weights on one GPU: identity below the budget, and speed.

    python tests/gpu/llama_shape.py dense|sparsek OUT.json [SPARSEK_JSON [LLM_ARGUMENTS_JSON]]

Runs one backend, writes tokens and times to OUT.json; if llama-dense.json lies beside it,
compares with that. Runner V1: VLLM_USE_V2_MODEL_RUNNER=0. The environment variable LLAMA_CASES
takes other batches than CASES, as 16x32768,1x8192; LLAMA_PROFILE=16x32768 also sums the time of
every kernel over some decode steps of such a batch. ``{"scorer": "learned"}`` gets a linear
scorer of random weights.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# requests x context
CASES = "16x2048,16x8192,1x8192,16x32768,1x32768,1x122880"


def prompt(seed: int, length: int) -> dict[str, Any]:
    """Random token ids."""
    import random

    draw = random.Random(seed)
    return {"prompt_token_ids": [draw.randrange(10, 128000) for _ in range(length)]}


def batch(name: str) -> list[dict[str, Any]]:
    """The prompts of a batch such as 16x32768: requests x context."""
    rows, length = map(int, name.split("x"))
    return [prompt(100 * length + 10 * rows + i, length) for i in range(rows)]


def random_scorer(folder: str) -> str:
    """A scorer file as `vllm-sparsek fit` writes them by default, of random weights."""
    import torch

    from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer

    heads, head_dim = SHAPE["num_key_value_heads"], SHAPE["head_dim"]
    features = ("key_unrotated", "key", "value")
    draw = torch.Generator().manual_seed(0)
    layers = {
        layer: {
            "weight": torch.randn(heads, len(features) * head_dim, generator=draw),
            "bias": torch.zeros(heads),
            "slope": torch.zeros(heads),
        }
        for layer in range(SHAPE["num_hidden_layers"])
    }
    inv_freq = SHAPE["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    header = ScorerHeader(kind="linear", features=features, rope="neox", model=None)
    path = Path(folder, "sparsek", "scorer.safetensors")
    path.parent.mkdir()
    save_scorer(path, ScorerFile(header, layers, inv_freq, None, "random", 0))
    return str(path)


def mixed_steps(llm: Any, rows: int, context: int, long: int) -> dict[str, float]:
    """Median ms of a step of ``rows`` decoding requests, alone and with chunks of a long prompt."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    add = lambda name, request, tokens: engine.add_request(  # noqa: E731
        name, request, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True,
                                      detokenize=False))  # fmt: skip
    for i in range(rows):
        add(f"mixed-{i}", prompt(5000 + i, context), 2000)
    done: set[str] = set()
    while len(done) < rows:
        done |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}

    def steps(wanted: int, until: str = "") -> list[float]:
        times, before = [], time.perf_counter()
        while len(times) < wanted:
            outputs = engine.step()
            now = time.perf_counter()
            times.append((now - before) * 1e3)
            before = now
            if any(o.request_id == until and o.outputs[0].token_ids for o in outputs):
                break
        return times

    alone = steps(64)
    add("long", prompt(6000, long), 1)
    beside = steps(1000, "long")
    engine.abort_request([f"mixed-{i}" for i in range(rows)])
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "mixed_decode_ms": median(alone),
        "mixed_chunk_ms": median(beside[1:]),
        "mixed_longest_ms": max(beside),
        "mixed_chunks": len(beside),
    }


def hit_rate(llm: Any, before: dict[str, float]) -> float:
    """Share of prompt tokens found in the prefix cache since the counters ``before``."""
    now = counters(llm)
    asked = now["vllm:prefix_cache_queries"] - before["vllm:prefix_cache_queries"]
    return (now["vllm:prefix_cache_hits"] - before["vllm:prefix_cache_hits"]) / asked


def counters(llm: Any) -> dict[str, float]:
    """vLLM's counters by name."""
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


def kernel_times(folder: Path) -> dict[str, list[float]]:
    """Launches and microseconds of every kernel in the traces of a folder, the longest first."""
    found: dict[str, list[float]] = {}
    for path in folder.rglob("*.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("cat") == "kernel":
                count, total = found.get(event["name"], (0, 0.0))
                found[event["name"]] = [count + 1, total + event["dur"]]
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def main(backend: str, out: Path, settings: dict[str, Any], more: dict[str, Any]) -> None:
    """Load the engine once and measure several things."""
    from vllm import LLM, SamplingParams

    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(SHAPE))
    extra: dict[str, Any] = {}
    if settings.get("scorer") == "learned":
        settings = {**settings, "scorer_path": random_scorer(folder)}
    if backend == "sparsek":
        extra = {"attention_backend": "sparsek", "additional_config": {"sparsek": settings}}
    else:
        extra = {"attention_backend": "FLASH_ATTN"}
    profiled, traces = os.environ.get("LLAMA_PROFILE"), Path(folder, "traces")
    if profiled:
        extra["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": str(traces)}
    started = time.perf_counter()
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=131072,
              max_num_seqs=32, gpu_memory_utilization=0.9, disable_log_stats=False,
              max_num_batched_tokens=8192, seed=0, **extra, **more)  # fmt: skip
    result: dict[str, Any] = {"backend": backend, "settings": settings}
    result["load_s"] = time.perf_counter() - started

    def run(prompts: list[dict[str, Any]], tokens: int) -> tuple[list[list[int]], float]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True,
                                detokenize=False)  # fmt: skip
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], time.perf_counter() - began

    short = [prompt(i, n) for i, n in enumerate((5, 17, 500, 1000, 1500, 1900))]
    result["short"], _ = run(short, 48)
    result["short_alone"] = [run([p], 48)[0][0] for p in short[3:5]]
    # kernels are compiled before anything is timed
    run([prompt(999, 20000), prompt(998, 9000)], 4)
    for name in os.environ.get("LLAMA_CASES", CASES).split(","):
        prompts = batch(name)
        read = sum(len(p["prompt_token_ids"]) for p in prompts)
        _, prefill = run(prompts, 1)
        run(prompts, 4)
        tokens, few = min((run(prompts, 8) for _ in range(2)), key=lambda r: r[1])
        _, many = min((run(prompts, 72) for _ in range(2)), key=lambda r: r[1])
        result[f"prefill_s_{name}"] = prefill
        result[f"decode_ms_{name}"] = (many - few) / 64 * 1e3
        result[f"tokens_{name}"] = tokens
        print(name, f"prefill {read / prefill:.0f} tok/s,",
              f"decode {result[f'decode_ms_{name}']:.2f} ms a step", flush=True)  # fmt: skip
    if profiled:
        prompts = batch(profiled)
        run(prompts, 4)
        # one step that reads the end of the prompts, then decode steps
        llm.start_profile()
        run(prompts, 17)
        llm.stop_profile()
        result[f"kernels_{profiled}"] = kernel_times(traces)
    # one prefix, many questions; one after the other, so that both backends can hit
    before, prefix = counters(llm), prompt(7000, 16384)["prompt_token_ids"]
    for i in range(8):
        run([{"prompt_token_ids": prefix + prompt(7001 + i, 512)["prompt_token_ids"]}], 8)
    result["shared_prefix_hit_rate"] = hit_rate(llm, before)
    result |= mixed_steps(llm, 16, 8192, 98304)
    out.write_text(json.dumps(result))
    print({k: v for k, v in result.items() if isinstance(v, int | float | str)})
    other = out.with_name("llama-dense.json")
    if backend == "sparsek" and other.exists():
        dense = json.loads(other.read_text())
        same = [a == b for a, b in zip(result["short"], dense["short"], strict=True)]
        print("short prompts equal dense, token for token:", same)
        for key in [
            k for k in result if k.startswith(("decode_ms", "prefill_s", "mixed", "shared"))
        ]:
            print(f"{key:24s} dense {dense[key]:8.2f}  sparsek {result[key]:8.2f}  "
                  f"x{dense[key] / result[key]:.2f}")  # fmt: skip


if __name__ == "__main__":
    settings, arguments = (json.loads(part) for part in [*sys.argv[3:], "{}", "{}"][:2])
    main(sys.argv[1], Path(sys.argv[2]), settings, arguments)
