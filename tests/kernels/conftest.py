"""Kernel tests run natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreter import DEVICE, interpreting, use_interpreter

use_interpreter()


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)
