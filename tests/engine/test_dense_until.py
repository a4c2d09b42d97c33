"""``dense_until``: a context read densely and what follows sparsely, with a tiny random model."""

from __future__ import annotations

import pytest
import torch
from answers import assert_same_tokens
from tiny import random_prompts, run_many, tiny_llm, write_model

pytestmark = pytest.mark.engine

LENGTHS = (600, 211, 40)
TOKENS = 12
SMALL = {"k": 64, "window": 32, "sinks": 4, "refresh": 16, "dense_until": 0, "scorer": "knorm"}
# neither a multiple of refresh nor of a page
WITHIN = 333
SETTINGS = {
    "sparse prefill": {**SMALL, "prefill": "sparse"},
    "within": {**SMALL, "prefill": "sparse", "dense_until": WITHIN},
    "within, in chunks": {**SMALL, "prefill": "sparse", "dense_until": WITHIN},
    "as long as the prompt": {**SMALL, "prefill": "sparse", "dense_until": LENGTHS[0]},
    "auto": {**SMALL, "prefill": "sparse", "dense_until": "auto"},
    # 4/3 of k, window and sinks
    "the number of auto": {**SMALL, "prefill": "sparse", "dense_until": 134},
    "dense prefill": {**SMALL, "prefill": "dense"},
    "dense prefill and all answers": {**SMALL, "prefill": "dense", "dense_until": 1000},
}
EXACT = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Answers by the name of the settings; ``dense`` is vLLM's own backend."""
    folder = tmp_path_factory.mktemp("model")
    llm = tiny_llm(write_model(folder), block_size=32)
    if not EXACT:
        llm["dtype"] = "float16"
    call = {"prompts": random_prompts(LENGTHS), "max_tokens": TOKENS}
    calls = [call, call, {**call, "reset": True, "one_by_one": True}]
    specs = [{"llm": llm, "calls": calls}]
    for name, settings in SETTINGS.items():
        chunks = {"max_num_batched_tokens": 120} if name == "within, in chunks" else {}
        sparsek = {"attention_backend": "sparsek", "additional_config": {"sparsek": settings}}
        specs.append({"llm": {**llm, **sparsek, **chunks}, "calls": calls})
    found = run_many(specs, tmp_path_factory.mktemp("run"))
    return dict(zip(["dense", *SETTINGS], found, strict=True))


def long_prompt(result):
    return result["answers"][0]["tokens"][0]


def test_neither_cache_hits_nor_batches_nor_chunks_change_what_is_read(results):
    first, again, alone = results["within"]["answers"]
    assert again["cached"][0] > WITHIN
    assert_same_tokens(again, first, EXACT)
    assert_same_tokens(alone, first, EXACT)
    assert_same_tokens(results["within, in chunks"]["answers"][0], first, EXACT)


def test_a_prompt_up_to_dense_until_is_read_as_with_dense_prefill(results):
    until = long_prompt(results["as long as the prompt"])
    assert until == long_prompt(results["dense prefill"])
    # it is sparse after it, and everything differs from a prompt read sparsely
    assert until != long_prompt(results["dense"])
    assert until != long_prompt(results["sparse prefill"])


def test_answers_below_dense_until_are_those_of_the_dense_backend(results):
    settings = results["dense prefill and all answers"]
    assert_same_tokens(settings["answers"][0], results["dense"]["answers"][0], EXACT)
    assert settings["density"] == 1


def test_auto_is_a_number(results):
    auto, number = results["auto"], results["the number of auto"]
    assert_same_tokens(auto["answers"][0], number["answers"][0], EXACT)
    assert auto["density"] == number["density"]


def test_the_counters_tell_dense_from_sparse_queries(results):
    order = (
        "sparse prefill",
        "auto",
        "within",
        "as long as the prompt",
        "dense prefill and all answers",
    )
    densities = [results[name]["density"] for name in order]
    assert densities == sorted(densities)
    assert len(set(densities)) == len(densities)
