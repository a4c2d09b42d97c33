"""Kernel tests run natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from interpreter import DEVICE, interpreting, use_interpreter  # noqa: E402

use_interpreter()


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("gpu"):
            item.add_marker(skip)
