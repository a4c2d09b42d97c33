"""One engine in a process of its own: runs the jobs of a cell and appends what came out.

Called with the path of a JSON file: {"llm": arguments of ``vllm.LLM``, "results": path,
"jobs": [{"id", "kind": "answers" | "losses", "prompts": path}]}. A prompts file is a list of
{"ids": [token ids], "max_tokens", "needles": [[start, stop]], "references": [...]}; the references
are for readers of the file, answers are judged later.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vllm_sparsek.evaluation import oracle

# tokens at the end of a window that are reported apart
LAST_SHARE = 0.25


def answers(llm: Any, prompts: list[dict[str, Any]], forced: bool) -> list[str]:
    """Greedy answers; with ``forced`` one at a time, the oracle told each one's needles."""
    from vllm import SamplingParams

    def generate(batch: list[dict[str, Any]]) -> list[str]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in batch],
            [SamplingParams(temperature=0, max_tokens=prompt["max_tokens"]) for prompt in batch],
            use_tqdm=False,
        )
        return [output.outputs[0].text for output in outputs]

    if not forced:
        return generate(prompts)
    found = []
    for prompt in prompts:
        oracle.OracleScorer.force(prompt["needles"])
        found += generate([prompt])
    return found


def losses(llm: Any, prompts: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Per window: sum of -log p and number of tokens, of all but the first and of the last part."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = []
    # one window at a time: log-probabilities over the whole vocabulary are large
    for prompt in prompts:
        ids = prompt["ids"]
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        steps = output.prompt_logprobs[1:]
        nll = [-step[token].logprob for step, token in zip(steps, ids[1:], strict=True)]
        last = int(LAST_SHARE * len(ids))
        found.append(
            {"nll": sum(nll), "tokens": len(nll), "nll_last": sum(nll[-last:]), "tokens_last": last}
        )
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one line and make sure that it is on the disk; other engines may do so, too."""
    with path.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def run(spec: dict[str, Any]) -> None:
    """Start the engine and do the jobs."""
    from vllm import LLM

    from vllm_sparsek.metrics import read_counters

    oracle.register()
    settings = spec["llm"].get("additional_config", {}).get("sparsek", {})
    forced = settings.get("scorer") == oracle.NAME
    llm = LLM(**spec["llm"], seed=0)
    config = llm.llm_engine.vllm_config
    before = read_counters(config)
    for job in spec["jobs"]:
        prompts = json.loads(Path(job["prompts"]).read_text())
        began = time.monotonic()
        found = answers(llm, prompts, forced) if job["kind"] == "answers" else losses(llm, prompts)
        after = read_counters(config)
        spent = {name: after[name] - before[name] for name in after}
        before = after
        record = {"id": job["id"], job["kind"]: found, "counters": spent,
                  "seconds": time.monotonic() - began}  # fmt: skip
        append(Path(spec["results"]), record)


def main() -> None:
    """Run the file named on the command line."""
    # through Python's exit, so that what the engine holds is given back
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
