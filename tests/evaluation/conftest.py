"""What the evaluation adds to a process ends with the test."""

from __future__ import annotations

import pytest

from vllm_sparsek.evaluation import oracle
from vllm_sparsek.scorers import SCORERS


@pytest.fixture(autouse=True)
def without_the_oracle():
    yield
    SCORERS.pop(oracle.NAME, None)
