"""Every kernel compiles for every GPU generation, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from interpreter import VARIABLE

from vllm_sparsek.kernels.common.compile_targets import SHARED_LIMIT, compile_cases

MODULE = "vllm_sparsek.kernels.common.compile_targets"


def compile_all(capability: int) -> dict[str, dict]:
    """Results by kernel name, from a process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    found = subprocess.run(
        [sys.executable, "-m", MODULE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    results = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    return {result["name"]: result for result in results}


@pytest.fixture(scope="module")
def compiled(request) -> dict[int, dict[str, dict]]:
    """Results of the generations that this session tests, as many at a time as there are cores."""
    ours = [item for item in request.session.items if item.module is request.module]
    wanted = sorted({item.callspec.params["capability"] for item in ours})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(compile_all, wanted), strict=True))


CASES = [(capability, name) for capability in SHARED_LIMIT for name, _ in compile_cases(capability)]


@pytest.mark.parametrize(("capability", "name"), CASES, ids=[f"sm_{c}-{name}" for c, name in CASES])
def test_kernel_compiles_and_fits_into_shared_memory(capability, name, compiled):
    result = compiled[capability][name]
    assert result["error"] is None
    assert result["cubin"] > 0
    assert result["shared"] <= SHARED_LIMIT[capability]
