"""What the real engine answers: equal to dense below the budget, invariant above it."""

from __future__ import annotations

import pytest
import torch
from answers import assert_same_tokens

pytestmark = pytest.mark.engine

# far below the prompts' lengths, so that most queries are sparse
SMALL = {"k": 96, "window": 48, "sinks": 4, "refresh": 16, "dense_until": 0}
CASES = {
    "quest": {**SMALL, "scorer": "quest"},
    "keydiff dense prefill": {**SMALL, "scorer": "keydiff"},
    "knorm sparse prefill": {**SMALL, "scorer": "knorm", "prefill": "sparse"},
    "pages, soft_v, share": {
        "k": 0.25, "k_min": 32, "window": 40, "sinks": 4, "refresh": 32, "granularity": "page",
        "mode": "soft_v", "scorer": "keydiff", "prefill": "sparse", "dense_layers": [0, 7],
        "dense_until": 0,
    },
    "knorm, dense until auto": {
        **SMALL, "scorer": "knorm", "prefill": "sparse", "dense_until": "auto",
    },
}  # fmt: skip
TOKENS = 24
# the CPU's default of 128 would leave page granularity nothing to choose from
PAGE = 32


# on a GPU no dtype that the dense path takes gives bitwise equal tokens for unequal batches
EXACT = not torch.cuda.is_available()


def same(answer, other):
    assert_same_tokens(answer, other, EXACT)


def calls(prompts):
    """Together, again from the prefix cache, and one by one on an empty cache."""
    call = {"prompts": prompts, "max_tokens": TOKENS}
    return [call, call, {**call, "reset": True, "one_by_one": True}]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def first(case, engine, prompts):
    return engine(calls(prompts), CASES[case], block_size=PAGE)


@pytest.fixture(scope="module")
def dense(engine, prompts):
    return engine(calls(prompts))


def test_default_budget_gives_the_dense_backends_tokens(engine, prompts, dense):
    result = engine([{"prompts": prompts, "max_tokens": TOKENS}], {})
    assert result["backend"] == "SPARSEK"
    same(result["answers"][0], dense["answers"][0])
    assert result["metrics"]["vllm:num_preemptions"] == 0


def test_a_small_budget_changes_what_is_read(first, dense, prompts):
    answer, reference = first["answers"][0], dense["answers"][0]
    tokens = answer["tokens"]
    assert tokens[:3] != reference["tokens"][:3]
    # the short prompt and its answer fit the budget of every case
    assert tokens[3] == reference["tokens"][3]
    assert all(len(set(answer)) > 4 for answer in tokens[:3]), "a repeating toy proves nothing"


def test_prefix_cache_hits_change_nothing(first, prompts):
    again = first["answers"][1]
    same(again, first["answers"][0])
    assert again["cached"][0] >= len(prompts[0]) // PAGE * PAGE - PAGE


def test_the_batch_changes_nothing(first):
    assert first["answers"][2]["cached"] == [0, 0, 0, 0]
    same(first["answers"][2], first["answers"][0])


def test_chunked_prefill_changes_nothing(case, engine, first, prompts):
    result = engine(calls(prompts)[:1], CASES[case], max_num_batched_tokens=120, block_size=PAGE)
    same(result["answers"][0], first["answers"][0])


def test_preemption_changes_nothing(case, engine, first, prompts):
    # all prompts fit, but not with their answers: somebody is preempted and recomputed
    # (one more block: vLLM's null block)
    fit = sum(-(-len(p) // PAGE) for p in prompts) + 1
    # the last to come is preempted: a long one, whose answer so far was read sparsely
    result = engine(
        calls(prompts[::-1])[:1], CASES[case], num_gpu_blocks_override=fit, max_model_len=1280,
        enable_prefix_caching=False, block_size=PAGE,
    )  # fmt: skip
    assert result["metrics"]["vllm:num_preemptions"] > 0
    same({key: found[::-1] for key, found in result["answers"][0].items()}, first["answers"][0])
