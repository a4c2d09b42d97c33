"""Kernels of sparse prefill are compiled when the engine has started, not by the first prompt.

On a CPU nothing compiles: there it is shown that layers register while vLLM loads the model, which
its runners for GPUs do collecting registrations, and that no layer on a CPU does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_driver
from tiny import random_prompts, tiny_llm, write_model

pytestmark = pytest.mark.engine

DRIVER = Path(__file__).with_name("warmup_driver.py")
LIMIT = 12288
SMALL = {
    "scorer": "keydiff", "prefill": "sparse", "k": 512, "window": 128, "sinks": 4, "refresh": 32,
    "dense_until": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # four queries a KV head: 128 rows share a list, for which the engine of Hopper is taken
    return write_model(
        tmp_path_factory.mktemp("model"), hidden_size=512, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=LIMIT,
    )  # fmt: skip


def start(model, settings, calls=(), **llm):
    """Start an engine and make calls, see ``warmup_driver``."""
    spec = {
        "llm": tiny_llm(
            model, attention_backend="sparsek", additional_config={"sparsek": settings}, **llm
        ),
        "calls": calls,
    }
    return run_driver(DRIVER, json.dumps(spec), timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what an engine on a CPU does")
@pytest.mark.parametrize("limit", [1024, 1000])
def test_layers_come_to_register_while_a_model_loads_and_those_on_a_cpu_do_not(model, limit):
    found = start(model, SMALL, max_model_len=limit)
    assert found["active"] == [True, True]
    assert found["registered"] == 0
    widths, ours = found["widths"]
    assert widths == [ours]


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["token", "page"])
def test_the_first_long_prompts_compile_no_kernel(model, granularity):
    prompts = random_prompts((9000, 12000, 3000, 700, 40))
    found = start(
        model, {**SMALL, "granularity": granularity},
        # a long prompt in six chunks, then prompts beside others that decode, then a lone chunk
        calls=[prompts[:1], prompts[1:], [prompts[2][:1500]]],
        max_model_len=LIMIT, max_num_batched_tokens=2048, enforce_eager=False,
        enable_prefix_caching=False,
        # full graphs of decode, as in serving, without the minute that torch.compile takes
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip
    assert found["active"] == [True, True]
    assert found["registered"] == 1
    widths, ours = found["widths"]
    assert widths == [ours]
    # that startup compiled some, by the names Triton gives them
    assert any("prefill" in kernel or "rows_fwd" in kernel for kernel in found["startup"])
    assert found["calls"] == [[], [], []]
