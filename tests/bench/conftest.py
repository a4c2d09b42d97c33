"""The fake command in a folder of its own, and no patience with it."""

import pytest
from fake import FAKE_VLLM, WORKLOADS, running, wait_until

from vllm_sparsek.serving_bench import (
    client,
    metrics,
    server,
)


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake_vllm.py"
    path.write_text(FAKE_VLLM)
    (tmp_path / "bench.yaml").write_text(WORKLOADS)
    yield path
    # whatever a test did, nothing it started is left; the dead may take a moment to be gone
    wait_until(lambda: not running(path), 2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(server, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "80")
