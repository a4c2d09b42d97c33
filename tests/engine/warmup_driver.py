"""Starts one engine in this process and prints which kernels of ours were compiled when, as JSON.

argv[1]: {"llm": {LLM arguments}, "calls": [[[token ids]]]}. ``startup`` and ``calls`` list kernels
by name, one for every variant that Triton compiled or loaded from its cache on disk; ``active``
says whether vLLM collected registrations when layers made theirs; ``registered`` is how many of
ours it has; ``widths`` are those of its block tables, and ours.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def listen(compiled: list[str]) -> None:
    """Add names of our kernels when a variant of them is made ready."""
    from triton.runtime.jit import JITFunction

    # not Triton's hook: with one set, Triton fails at constexprs of some kernels of vLLM's
    compile_variant = JITFunction._do_compile

    def compile_and_note(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.fn.__module__.startswith("vllm_sparsek"):
            compiled.append(self.fn.__name__)
        return compile_variant(self, *arguments, **more)

    JITFunction._do_compile = compile_and_note


def collect_on_cpu() -> None:
    """Let the CPU's runner collect registrations while it loads a model, as those of GPUs do."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    def load_model(self: Any, *arguments: Any, **more: Any) -> None:
        with self.jit_warmup_registry.activate():
            load(self, *arguments, **more)

    CPUModelRunner.load_model = load_model


def table_widths(runner: Any) -> list[int]:
    """Entries from one row to the next in the block tables of either runner."""
    if hasattr(runner, "block_tables"):
        return [table.stride(0) for table in runner.block_tables.input_block_tables]
    return [
        table.get_device_tensor(1).stride(0)
        for table in runner.input_batch.block_table.block_tables
    ]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """What the module says."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_sparsek import compat
    from vllm_sparsek.attention import warmup

    compiled: list[str] = []
    active: list[bool] = []
    register = warmup.register

    def register_and_note(*arguments: Any) -> None:
        active.append(JitWarmupRegistry._active.get() is not None)
        register(*arguments)

    warmup.register = register_and_note
    if torch.cuda.is_available():
        listen(compiled)
    else:
        collect_on_cpu()
    llm = LLM(**spec["llm"])
    startup = list(compiled)
    config = llm.llm_engine.vllm_config
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    ours = runner.jit_warmup_registry._registrations.get(compat.warmup._warmups(), [])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    calls = []
    for prompts in spec["calls"]:
        compiled.clear()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        calls.append(list(compiled))
    page = config.cache_config.block_size
    widths = table_widths(runner), compat.block_table_width(config.model_config.max_model_len, page)
    return {
        "startup": startup, "calls": calls, "active": active, "registered": len(ours),
        "widths": widths,
    }  # fmt: skip


if __name__ == "__main__":
    print("RESULT " + json.dumps(run(json.loads(sys.argv[1]))))
