"""Head shapes, dtypes and mixed layers through the real engine, with tiny random models."""

from __future__ import annotations

import math
import os

import pytest
import torch
from answers import assert_same_tokens
from tiny import random_prompts, run_many, tiny_llm, write_model

pytestmark = pytest.mark.engine

# two prompts far beyond the small budget, one inside it
PROMPTS = random_prompts((600, 211, 40))
TOKENS = 12
SMALL = {"k": 64, "window": 32, "sinks": 4, "refresh": 16, "dense_until": 0}
CUDA = torch.cuda.is_available()


def heads(query, kv, head_dim, dtype="float16" if CUDA else "float32"):
    # transformers wants a hidden size that is a multiple of the query heads
    hidden = query * 32 * max(1, 8 // query)
    return {
        "hidden_size": hidden, "num_attention_heads": query, "num_key_value_heads": kv,
        "head_dim": head_dim,
    }, dtype  # fmt: skip


# model -> (config.json, dtype)
MODELS = {
    "mha d64": heads(4, 4, 64),
    "mqa d64": heads(4, 1, 64),
    "gqa 7 d64": heads(7, 1, 64),
    "gqa 3 d80 bfloat16": heads(6, 2, 80, "bfloat16"),
    "gqa 2 d96": heads(4, 2, 96),
    "gqa 4 d128 float16": heads(8, 2, 128, "float16"),
    "mqa d256": heads(2, 1, 256),
}
MIXED = "sliding and full layers"
# this family overflows in float16
MIXED_DTYPE = "bfloat16" if CUDA else "float32"
MIXED_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# settings beyond the default -> what they are called
SETTINGS = {
    "default": {},
    "dense prefill": SMALL,
    "sparse prefill": {**SMALL, "scorer": "keydiff", "prefill": "sparse"},
    "pages, soft_v": {
        **SMALL,
        "scorer": "keydiff",
        "prefill": "sparse",
        "granularity": "page",
        "mode": "soft_v",
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """``answers[model, settings]``; settings None is vLLM's own backend."""
    folder = tmp_path_factory.mktemp("models")
    call = {"prompts": PROMPTS, "max_tokens": TOKENS}
    calls = [call, call, {**call, "reset": True, "one_by_one": True}]
    keys, specs = [], []
    for index, (name, (config, dtype)) in enumerate([*MODELS.items(), (MIXED, ({}, None))]):
        if name == MIXED:
            path = write_model(
                folder / "mixed", "gemma3_text", num_hidden_layers=6, layer_types=MIXED_LAYERS,
                sliding_window=64, query_pre_attn_scalar=64,
            )  # fmt: skip
            dtype = MIXED_DTYPE
            small = ["dense prefill", "sparse prefill"]
        else:
            path = write_model(folder / str(index), **config)
            # every shape meets one of them
            small = [[*SETTINGS][1 + index % 3]]
        for settings in (None, "default", *small):
            llm = tiny_llm(path, dtype=dtype, block_size=32, enforce_eager=not CUDA)
            if settings is not None:
                llm["attention_backend"] = "sparsek"
                llm["additional_config"] = {"sparsek": SETTINGS[settings]}
            keys.append((name, settings))
            specs.append({"llm": llm, "calls": calls})
    # what a kernel's fault breaks is its process
    mixed = [name for name, _ in keys].index(MIXED)
    results = [*run_many(specs[:mixed], folder), *run_many(specs[mixed:], folder)]
    results = [{**result, "spec": spec} for result, spec in zip(results, specs, strict=True)]
    return dict(zip(keys, results, strict=True))


@pytest.fixture(params=[*MODELS, MIXED])
def model(request):
    return request.param


def same(model, answer, other):
    dtype = MODELS[model][1] if model in MODELS else MIXED_DTYPE
    assert_same_tokens(answer, other, exact=dtype == "float32")


def found(answers, model, settings):
    result = answers[model, settings]
    assert "error" not in result, result["error"]
    return result


def small(answers, model):
    """The runs of a model whose budget is far below the prompts' lengths."""
    names = [s for name, s in answers if name == model and s not in (None, "default")]
    assert names
    return [found(answers, model, name) for name in names]


def test_a_budget_beyond_the_context_gives_the_dense_backends_tokens(answers, model):
    dense, sparse = found(answers, model, None), found(answers, model, "default")
    assert "SPARSEK" not in dense["backends"].values()
    assert "SPARSEK" in sparse["backends"].values()
    for ours, theirs in zip(sparse["answers"], dense["answers"], strict=True):
        same(model, theirs, ours)


def test_a_small_budget_changes_long_prompts_and_no_short_one(answers, model):
    dense = found(answers, model, None)["answers"][0]
    for result in small(answers, model):
        answer = result["answers"][0]
        assert answer["tokens"][:2] != dense["tokens"][:2]
        assert all(math.isfinite(total) for total in answer["logprobs"])
        same(model, *({k: v[2:] for k, v in a.items()} for a in (dense, answer)))


def test_prefix_cache_hits_change_nothing(answers, model):
    for result in small(answers, model):
        first, again, _ = result["answers"]
        assert again["cached"] == [576, 192, 32]
        same(model, first, again)


def test_the_batch_changes_nothing(answers, model):
    for result in small(answers, model):
        first, _, alone = result["answers"]
        assert alone["cached"] == [0, 0, 0]
        same(model, first, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.skipif(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0", reason="of runner V2")
def test_every_shape_of_decode_batches_has_a_graph_for_each_path_alone(answers, model):
    both, *alone = found(answers, model, "default")["graphs"]
    assert alone == [both, both] and both > 0
    assert len(found(answers, model, None)["graphs"]) == 1


def test_layers_with_a_sliding_window_keep_vllms_own_backend(answers):
    result = found(answers, MIXED, "dense prefill")
    own = set(found(answers, MIXED, None)["backends"].values())
    for index, kind in enumerate(MIXED_LAYERS):
        backend = result["backends"][f"model.layers.{index}.self_attn.attn"]
        assert {backend} == ({"SPARSEK"} if kind == "full_attention" else own)


def test_mixed_layers_share_one_group_under_our_rule_for_prefix_caching(answers):
    assert found(answers, MIXED, "dense prefill")["managers"] == ["PromptCachedManager"]
    assert found(answers, MIXED, "sparse prefill")["managers"] == ["FullAttentionManager"]
    # without the plugin, each kind has its own
    assert len(found(answers, MIXED, None)["managers"]) > 1


def test_mixed_layers_work_with_workers_in_processes_of_their_own(answers, engine):
    here = found(answers, MIXED, "dense prefill")
    calls = here["spec"]["calls"][:1]
    there = engine(calls, SETTINGS["dense prefill"], **here["spec"]["llm"])
    same(MIXED, here["answers"][0], there["answers"][0])
