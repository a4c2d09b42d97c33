"""An fp8 KV cache through the real engine: FLASH_ATTN's answers below the budget, mostly the 16-bit
cache's where both read the same tokens sparsely. Needs a GPU whose FlashAttention has one."""

from __future__ import annotations

import math

import pytest
from answers import assert_same_tokens
from tiny import random_prompts, run_many, tiny_llm, write_model

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

# two prompts far beyond the small budget, one inside it
PROMPTS = random_prompts((600, 211, 40))
TOKENS = 12
# first tokens are compared over more of them
MORE = random_prompts((600, 211, 40, 500, 400, 300, 350, 450, 250, 550))
# of keys and values: the tiny model's reach 9, fp8 reaches 448
SCALES = [0.04, 0.03]
SMALL = {"k": 64, "window": 32, "sinks": 4, "refresh": 16, "dense_until": 0}
SETTINGS = {
    "default": {},
    "quest": SMALL,
    "keydiff": {**SMALL, "scorer": "keydiff", "prefill": "sparse"},
    # what it reads depends on positions alone, so both cache dtypes read the same tokens
    "recency": {**SMALL, "scorer": "recency", "prefill": "sparse"},
    "dense layer": {**SMALL, "scorer": "keydiff", "prefill": "sparse", "dense_layers": [0]},
}
# Of MORE's first tokens, how many survive rounding to fp8 at least. Random weights amplify it: with
# keys and values rounded in float32 on the CPU, 7 of 10 do; with a scale left out, 0 or 1.
SURVIVE = 5


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """``answers[settings, cache dtype]``; settings None is FLASH_ATTN."""
    folder = tmp_path_factory.mktemp("models")
    path = write_model(
        folder / "model", hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64
    )
    call = {"prompts": PROMPTS, "max_tokens": TOKENS}
    fresh = {**call, "reset": True}
    calls = [call, call, {**fresh, "one_by_one": True}, {**fresh, "prompts": MORE, "max_tokens": 1}]
    keys = [(name, "fp8") for name in (None, *SETTINGS)] + [("recency", "auto")]
    specs = []
    for settings, dtype in keys:
        # FLASH_ATTN's queries are quantised by the compiled graph, from numbers that were never
        # rounded to 16 bits: the same operations in the same order run only without it
        eager = settings in (None, "default")
        llm = tiny_llm(
            # over an fp8 cache FlashAttention-3 writes bfloat16 alone
            path, dtype="bfloat16", kv_cache_dtype=dtype, block_size=32, enforce_eager=eager,
            attention_backend="FLASH_ATTN" if settings is None else "sparsek",
        )  # fmt: skip
        if settings is not None:
            llm["additional_config"] = {"sparsek": SETTINGS[settings]}
        spec = {"llm": llm, "calls": calls}
        specs.append(spec if dtype == "auto" else {**spec, "kv_scales": SCALES})
    return dict(zip(keys, run_many(specs, folder), strict=True))


def found(answers, settings, dtype="fp8"):
    result = answers[settings, dtype]
    assert "error" not in result, result["error"]
    return result


def test_a_budget_beyond_the_context_gives_flash_attentions_tokens(answers):
    dense, ours = found(answers, None), found(answers, "default")
    assert "SPARSEK" not in dense["backends"].values()
    assert "SPARSEK" in ours["backends"].values()
    for mine, theirs in zip(ours["answers"], dense["answers"], strict=True):
        assert_same_tokens(theirs, mine, exact=False)


def test_sparse_attention_over_fp8_mostly_agrees_with_that_over_16_bits(answers):
    dense = found(answers, None)["answers"][0]["tokens"]
    assert found(answers, "recency")["answers"][0]["tokens"][:2] != dense[:2], "nothing was dropped"
    # the first token alone follows the same prompt under both
    fp8, plain = (
        found(answers, "recency", dtype)["answers"][3]["tokens"] for dtype in ("fp8", "auto")
    )
    assert sum(ours == theirs for ours, theirs in zip(fp8, plain, strict=True)) >= SURVIVE


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "default"])
def test_cache_hits_and_the_batch_change_nothing(answers, settings):
    first, again, alone, _ = found(answers, settings)["answers"]
    assert all(math.isfinite(total) for total in first["logprobs"])
    assert again["cached"] == [576, 192, 32]
    assert alone["cached"] == [0, 0, 0]
    assert_same_tokens(first, again, exact=False)
    assert_same_tokens(first, alone, exact=False)
