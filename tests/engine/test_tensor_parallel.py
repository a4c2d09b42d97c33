"""Tensor parallelism over two GPUs: a layer's KV heads, their scorer and budget are split."""

from __future__ import annotations

import pytest
import torch
from answers import assert_same_tokens
from tiny import random_prompts, tiny_llm, write_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# sums over GPUs through plain NCCL: vLLM's other ways may use NVLink multicast, which a borrowed
# machine may forbid and which is not what is tested
PLAIN_SUMS = {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip
PLAIN_LLM = {
    "disable_custom_all_reduce": True,
    # full graphs of decode, as in serving, without the minute that torch.compile takes
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
TOKENS = 16
# within the budget of the defaults, and far beyond the small one
PROMPTS = random_prompts((900, 331, 40))
SMALL = {"k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_until": 0}
SETTINGS = {
    "default": {},
    "keydiff, sparse prefill": {**SMALL, "scorer": "keydiff", "prefill": "sparse"},
    "quest": {**SMALL, "scorer": "quest"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # four KV heads, two a rank
    folder = tmp_path_factory.mktemp("model")
    return write_model(
        folder, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64
    )


@pytest.fixture(scope="module")
def answers(model, engine):
    """``answers(settings, GPUs)`` of one engine, with CUDA graphs; settings None is FLASH_ATTN."""
    found = {}

    def ask(name, size):
        if (name, size) not in found:
            llm = tiny_llm(model, enforce_eager=False, tensor_parallel_size=size, **PLAIN_LLM)
            if name is None:
                llm["attention_backend"] = "FLASH_ATTN"
            call = {"prompts": PROMPTS, "max_tokens": TOKENS}
            found[name, size] = engine([call, call], SETTINGS.get(name), **llm)
        return found[name, size]

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in PLAIN_SUMS.items():
            patch.setenv(variable, value)
        yield ask


def test_tokens_below_the_budget_are_those_of_the_dense_backend(answers):
    result = answers("default", 2)
    assert result["backend"] == "SPARSEK"
    assert_same_tokens(result["answers"][0], answers(None, 2)["answers"][0], exact=False)


@pytest.mark.parametrize("name", ["keydiff, sparse prefill", "quest"])
def test_two_ranks_read_what_one_reads(name, answers):
    two, one, dense = answers(name, 2), answers(name, 1), answers(None, 2)
    assert_same_tokens(two["answers"][0], one["answers"][0], exact=False)
    # from the prefix cache
    assert_same_tokens(two["answers"][1], two["answers"][0], exact=False)
    assert two["answers"][0]["tokens"][0] != dense["answers"][0]["tokens"][0]
