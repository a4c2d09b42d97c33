"""`vllm serve` with SparseK: the OpenAI client, /metrics, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import engine_env, engine_flags

pytestmark = pytest.mark.engine

READY_SECONDS = 300
SETTINGS = {"k": 64, "window": 32, "sinks": 4, "refresh": 16, "dense_until": 0}
# by name: the model has a shipped scorer
SPARSEK = {"scorer": "quest", **SETTINGS}
TOKENS = 40
MODEL_NAME = "demo"


@dataclass
class Server:
    """A running `vllm serve`.

    Attributes:
        url: its address; process: its API process; log: what it printed; folder: its TMPDIR.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def counters(self) -> list[Path]:
        return list(self.folder.glob("vllm-sparsek-*.counters"))


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve")
    # short: vLLM puts sockets there, whose paths are limited
    temporary = Path(tempfile.mkdtemp(prefix="sk"))
    log = folder / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_dir,
        "--attention-config.backend", "sparsek",
        "--additional-config", json.dumps({"sparsek": SPARSEK}),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME,
        *engine_flags(), "--max-model-len", "2048", "--enforce-eager",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=engine_env(TMPDIR=str(temporary)), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    found = Server(f"http://127.0.0.1:{port}", process, log, temporary)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                found.get("/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield found
    finally:
        # the whole process group that this fixture started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def metrics(server):
    """SparseK's samples: name -> (labels, value)."""
    pattern = re.compile(r"^(sparsek:\w+)\{(.*)\} (\S+)$", re.M)
    return {
        name: (dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        for name, labels, value in pattern.findall(server.get("/metrics"))
    }


@pytest.fixture(scope="module")
def before(server):
    return metrics(server)


@pytest.fixture(scope="module")
def answer(server, before, long_text):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    message = {"role": "user", "content": long_text[:4000] + "\n\nSummarise this."}
    return client.chat.completions.create(
        model=MODEL_NAME, messages=[message], max_tokens=TOKENS, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def after(server, answer):
    return metrics(server)


def test_an_openai_client_gets_an_answer_to_a_prompt_beyond_the_budget(answer):
    assert answer.usage.prompt_tokens > 5 * sum(SETTINGS.values())
    assert answer.usage.completion_tokens == TOKENS
    assert len(set(answer.choices[0].message.content.split())) > 5


def test_the_log_says_which_backend_and_which_settings(server, answer):
    log = server.log.read_text()
    assert "SPARSEK backend." in log
    assert "k=64" in log
    assert log.count("no scorer fitted to this model is in use") == 1


def test_metrics_are_exported_from_the_start(before):
    assert before["sparsek:tokens_attended_total"][1] == before["sparsek:context_tokens_total"][1]


COUNTERS = (
    "tokens_attended", "context_tokens", "decode_tokens_attended", "decode_context_tokens",
    "dense_steps", "steps",
)  # fmt: skip


def test_metrics_carry_vllms_labels(after):
    assert set(after) == {f"sparsek:{name}_total" for name in COUNTERS} | {"sparsek:density"}
    for labels, _ in after.values():
        assert labels == {"engine": "0", "model_name": MODEL_NAME}


def test_counters_are_those_of_dense_prefill_and_sparse_decode(answer, before, after):
    counted = {
        name: after[f"sparsek:{name}_total"][1] - before[f"sparsek:{name}_total"][1]
        for name in COUNTERS
    }
    prompt = answer.usage.prompt_tokens
    in_prompt = prompt * (prompt + 1) // 2
    positions = range(prompt, prompt + TOKENS - 1)
    context = sum(p + 1 for p in positions)
    # k, sinks and window in whole units of 16 tokens; the window grows through a refresh block
    read = sum(64 + 16 + 33 + p % 16 for p in positions)
    assert counted == {
        "tokens_attended": in_prompt + read, "context_tokens": in_prompt + context,
        "decode_tokens_attended": read, "decode_context_tokens": context,
        # one step for the prompt and the first token, then one a token
        "dense_steps": 1, "steps": TOKENS,
    }  # fmt: skip


def test_density_is_the_share_read_since_the_start(after):
    density = after["sparsek:density"][1]
    assert 0 < density < 1
    share = after["sparsek:tokens_attended_total"][1] / after["sparsek:context_tokens_total"][1]
    assert density == pytest.approx(share)


def test_a_scrape_does_not_count(server, after):
    assert metrics(server) == after


# the last test: it ends the server
def test_sigterm_leaves_no_process_and_no_file_behind(server, answer):
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    assert len(server.counters()) == 1
    server.process.terminate()
    server.process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert server.counters() == []
