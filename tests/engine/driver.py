"""Runs one real vLLM engine in a process of its own and prints what it answered as JSON.

argv[1]: {"llm": {LLM arguments}, "calls": [{"prompts": [[token ids]], "max_tokens": n,
"reset": bool, "one_by_one": bool}]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def gap(step: dict[int, Any]) -> float:
    """Log-probability between the best and the second token: how sure the choice was."""
    best = sorted((entry.logprob for entry in step.values()), reverse=True)
    return best[0] - best[1]


def run(
    spec: dict[str, Any],
    inspect: Callable[[Any], None] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Start the engine, make the calls in order, return tokens and metrics."""
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=False, **spec["llm"])
    if prepare is not None:
        prepare(llm)
    answers = []
    for call in spec["calls"]:
        if call.get("reset"):
            assert llm.reset_prefix_cache()
        params = SamplingParams(
            temperature=0,
            max_tokens=call["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
        )
        prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
        groups = [[p] for p in prompts] if call.get("one_by_one") else [prompts]
        outputs = [o for group in groups for o in llm.generate(group, params, use_tqdm=False)]
        answers.append(
            {
                "tokens": [list(o.outputs[0].token_ids) for o in outputs],
                "cached": [o.num_cached_tokens for o in outputs],
                "logprobs": [o.outputs[0].cumulative_logprob for o in outputs],
                "gaps": [[gap(step) for step in o.outputs[0].logprobs] for o in outputs],
            }
        )
    if inspect is not None:
        inspect(llm)
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    backend = llm.llm_engine.vllm_config.attention_config.backend
    return {"answers": answers, "metrics": metrics, "backend": backend and backend.name}


if __name__ == "__main__":
    result = run(json.loads(sys.argv[1]))
    print("RESULT " + json.dumps(result))
