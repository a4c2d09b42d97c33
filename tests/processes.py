"""Processes that tests start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_sparsek.serving_bench.demo.cli import CPU_ENV


def engine_env(**more: str) -> dict[str, str]:
    """Environment of an engine process; the Triton interpreter never leaks into it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**env, **CPU_ENV, **more}


def run_driver(driver: Path, argument: str, timeout: float = 900, **env: str) -> Any:
    """What a script prints as JSON after RESULT; if it fails, show the end of its log."""
    done = subprocess.run(
        [sys.executable, str(driver), argument],
        env=engine_env(**env), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stdout[-6000:] + done.stderr[-4000:]
    return json.loads(lines[-1][len("RESULT ") :])


def engine_memory() -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; a fixed size on a GPU, so that engines can share it."""
    import torch

    if torch.cuda.is_available():
        return {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2 << 30}
    return {"gpu_memory_utilization": 0.3}


def engine_flags() -> list[str]:
    """``engine_memory`` on a command line of vLLM."""
    return [
        part
        for name, value in engine_memory().items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]


def run_python(code: str, env: dict[str, str] | None = None, timeout: float = 600) -> str:
    """Run code in a fresh interpreter and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **(env or {})},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
