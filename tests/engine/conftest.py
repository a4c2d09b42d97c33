"""Engines for the tests: each distinct specification runs once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import engine_memory, run_driver

DRIVER = Path(__file__).with_name("driver.py")


def run_engine(llm: dict[str, Any], calls: list[dict[str, Any]], **env: str) -> dict[str, Any]:
    """Start an engine and make calls, see ``driver``."""
    return run_driver(DRIVER, json.dumps({"llm": llm, "calls": calls}), **env)


def shared_llm() -> dict[str, Any]:
    """Arguments every engine shares; float32 on the CPU, where greedy tokens must be equal."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "dtype": "float16" if cuda else "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        **engine_memory(),
        "enforce_eager": not cuda,
        "seed": 0,
    }


@pytest.fixture(scope="session")
def base_llm(model_dir: str) -> dict[str, Any]:
    """Arguments of the engines of the small real model."""
    return {"model": model_dir, **shared_llm()}


@pytest.fixture(scope="session")
def prompts(model_dir: str, long_text: str) -> list[list[int]]:
    """Token ids of real prose; lengths around and beyond the budgets of the tests."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_dir)(long_text[:40000])["input_ids"]
    starts = (0, 1500, 3000, 4500)
    lengths = (1100, 500, 771, 40)
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """``engine(calls, sparsek=None | {...}, **llm arguments)``, cached by its arguments.

    The real model is there for those alone who name no other.
    """
    cache: dict[str, dict[str, Any]] = {}

    def start(
        calls: list[dict[str, Any]], sparsek: dict[str, Any] | None = None, **llm: Any
    ) -> dict[str, Any]:
        if "model" not in llm:
            llm["model"] = request.getfixturevalue("model_dir")
        arguments = {**shared_llm(), **llm}
        if sparsek is not None:
            arguments["attention_backend"] = "sparsek"
            arguments["additional_config"] = {"sparsek": sparsek}
        key = json.dumps([arguments, calls], sort_keys=True)
        if key not in cache:
            cache[key] = run_engine(arguments, calls)
        return cache[key]

    return start
