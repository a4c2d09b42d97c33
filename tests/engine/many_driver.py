"""Runs many small engines one after another in this process and prints their answers as JSON.

argv[1]: a JSON file with a list of specifications, see driver.py; "scores": n adds the scores of
the first request's first n tokens, "shipped": folder stands for that of the shipped scorers,
"kv_scales": [of keys, of values] are given to every layer before the first call. A
model that cannot be served gives {"error": ...} instead of answers. With engines in the process
itself, starting one takes seconds; what happens between processes is for driver.py to show.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import driver


def backends(llm: Any) -> dict[str, str]:
    """Backend of every attention layer by the layer's name."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer.get_attn_backend().get_name() for name, layer in layers.items()}


def density(llm: Any) -> float | None:
    """Share of the context that was read, or None without SparseK."""
    from vllm_sparsek import metrics

    counted = metrics.read_counters(llm.llm_engine.vllm_config)
    context = counted["context_tokens"]
    return counted["tokens_attended"] / context if context else None


def scores(llm: Any, tokens: int) -> dict[str, Any]:
    """[tokens][KV heads] scores of every layer; a fresh pool hands out blocks 1, 2, ..."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    found = {}
    for name, layer in layers.items():
        if name.endswith(".sparsek_scores"):
            pages = layer.views().scores[1:].transpose(1, 2).flatten(0, 1)
            found[name] = pages[:tokens].tolist()
    return found


def set_kv_scales(llm: Any, k_scale: float, v_scale: float) -> None:
    """What a checkpoint with scales would have loaded; graphs are captured by now."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        if hasattr(layer, "_k_scale"):
            layer._k_scale.fill_(k_scale)
            layer._v_scale.fill_(v_scale)


def managers(llm: Any) -> list[str]:
    """The class that allocates blocks, for every KV cache group."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return [type(m).__name__ for m in scheduler.kv_cache_manager.coordinator.single_type_managers]


def graphs(llm: Any) -> list[int]:
    """Full CUDA graphs that were captured: vLLM's own, and those of one path."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    manager = getattr(executor.driver_worker.worker.model_runner, "cudagraph_manager", None)
    own = getattr(manager, "graphs", {}), *getattr(manager, "sparsek_graphs", {}).values()
    return [len(graphs_) for graphs_ in own]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """One engine's answers."""
    found: dict[str, Any] = {}
    if "shipped" in spec:
        from vllm_sparsek.scorers import shipped

        shipped.shipped_folder = lambda: Path(spec["shipped"])

    def inspect(llm: Any) -> None:
        found.update(backends=backends(llm), density=density(llm), managers=managers(llm))
        found["graphs"] = graphs(llm)
        if "scores" in spec:
            found["scores"] = scores(llm, spec["scores"])

    def prepare(llm: Any) -> None:
        if "kv_scales" in spec:
            set_kv_scales(llm, *spec["kv_scales"])

    try:
        result = driver.run(spec, inspect, prepare)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {**result, **found}


if __name__ == "__main__":
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    for specification in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run(specification))
        gc.collect()
        cleanup_dist_env_and_memory()
    print("RESULT " + json.dumps(results))
