"""Llama-3.1-8B shape with dummy weights on one GPU: identity below the budget, and speed.

    python tests/gpu/llama_shape.py dense|sparsek OUT.json [SPARSEK_JSON [LLM_ARGUMENTS_JSON]]

Runs one backend, writes tokens and times to OUT.json; if llama-dense.json lies beside it,
compares with that. Runner V1: VLLM_USE_V2_MODEL_RUNNER=0. The environment variable LLAMA_CASES
takes other batches than CASES, as 16x32768,1x8192,16x8192+prefill: +prefill leaves out decode; a
batch named twice is measured twice. LLAMA_PROFILE=16x32768 also sums the time of every kernel over
some decode steps of such a batch. LLAMA_ONLY_CASES=1 leaves out cache hits and mixed batches.
``{"scorer": "learned"}`` gets a linear scorer of random weights.
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
CASES = "16x2048,16x8192,1x8192,16x32768,1x122880,16x2048"
# marks a batch whose decode is not timed
PREFILL = "+prefill"
# tokens of the two generations whose difference is decode; the long one where steps are short, so
# that 1 % of a step is several ms of it
FEW, MANY, MANY_SHORT = 8, 72, 136
SHORT_CONTEXT = 8192
REPEATS = 4


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
    """Steps of ``rows`` decoding requests, alone and until a long prompt beside them is read.

    Some steps beside it hold a chunk and some do not: their median is either's.
    """
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
        "mixed_long_s": sum(beside) / 1e3,
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
    seen: dict[str, int] = {}
    for case in os.environ.get("LLAMA_CASES", CASES).split(","):
        name = case.removesuffix(PREFILL)
        prompts, context = batch(name), int(name.split("x")[1])
        if f"prefill_s_{name}" not in result:
            _, result[f"prefill_s_{name}"] = run(prompts, 1)
        # what was measured is kept if what follows runs out of time
        out.write_text(json.dumps(result))
        if case.endswith(PREFILL):
            continue
        seen[name] = seen.get(name, 0) + 1
        key = name if seen[name] == 1 else f"{name}_again_{seen[name] - 1}"
        # the prompts are cached but for a last block; the first run is not timed
        many = MANY_SHORT if context <= SHORT_CONTEXT else MANY
        run(prompts, 2)
        runs = [[run(prompts, n) for n in (FEW, many)] for _ in range(REPEATS)]
        brief, lengthy = ([pair[i][1] for pair in runs] for i in range(2))
        result[f"decode_ms_{key}"] = (min(lengthy) - min(brief)) / (many - FEW) * 1e3
        # of every pair: how far one measurement is to be trusted
        slopes = [(b - a) / (many - FEW) * 1e3 for a, b in zip(brief, lengthy, strict=True)]
        result[f"decode_ms_all_{key}"] = slopes
        result[f"tokens_{key}"] = runs[0][0][0]
        print(key, " ".join(f"{slope:.3f}" for slope in slopes), "ms a step", flush=True)
    if profiled:
        prompts = batch(profiled)
        run(prompts, 4)
        # one step that reads the end of the prompts, then decode steps
        llm.start_profile()
        run(prompts, 17)
        llm.stop_profile()
        result[f"kernels_{profiled}"] = kernel_times(traces)
    out.write_text(json.dumps(result))
    if os.environ.get("LLAMA_ONLY_CASES") != "1":
        # one prefix, many questions; one after the other, so that both backends can hit
        before, prefix = counters(llm), prompt(7000, 16384)["prompt_token_ids"]
        for i in range(8):
            run([{"prompt_token_ids": prefix + prompt(7001 + i, 512)["prompt_token_ids"]}], 8)
        result["shared_prefix_hit_rate"] = hit_rate(llm, before)
        result |= mixed_steps(llm, 16, 8192, 98304)
        out.write_text(json.dumps(result))
    report(out, result)


def report(out: Path, result: dict[str, Any]) -> None:
    """Print one table: what was measured, beside dense where that is there."""
    other, dense = out.with_name("llama-dense.json"), {}
    if result["backend"] == "sparsek" and other.exists():
        dense = json.loads(other.read_text())
        for key in ("short", "short_alone"):
            same = [a == b for a, b in zip(result[key], dense[key], strict=True)]
            print(f"{key}: equal to dense, token for token: {same}")
    for key, value in result.items():
        if not isinstance(value, int | float):
            continue
        line = f"{key:32s} {value:9.3f}"
        if isinstance(dense.get(key), int | float) and value:
            line += f"  dense {dense[key]:9.3f}  x{dense[key] / value:.3f}"
        print(line)


if __name__ == "__main__":
    settings, arguments = (json.loads(part) for part in [*sys.argv[3:], "{}", "{}"][:2])
    main(sys.argv[1], Path(sys.argv[2]), settings, arguments)
