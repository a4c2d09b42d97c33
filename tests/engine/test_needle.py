"""A fact that was said once, far outside the window, is found by queries that choose."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine

TOKENS = 3000
# 496 tokens: a sixth of the context
SMALL = {"k": 384, "window": 96, "sinks": 16}
KEYS = ("48213", "90571", "67384")
DEPTHS = (0.2, 0.45, 0.7)


@pytest.fixture(scope="module")
def needles(model_dir, long_text):
    """Prompts of real prose with one number in it, asked for at the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prose = tokenizer(long_text[:60000])["input_ids"]
    question = tokenizer("\n\nWhat is the pass key? The pass key is")["input_ids"]
    prompts = []
    for index, (key, depth) in enumerate(zip(KEYS, DEPTHS, strict=True)):
        said = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
        needle = tokenizer(said)["input_ids"]
        body = prose[index * TOKENS :][: TOKENS - len(needle) - len(question)]
        at = int(depth * len(body))
        prompts.append(body[:at] + needle + body[at:] + question)
    return prompts


@pytest.fixture(scope="module")
def found(model_dir, needles, engine):
    """``found(settings)``: how many of the numbers the model answers with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def ask(settings):
        calls = [{"prompts": needles, "max_tokens": 8}]
        tokens = engine(calls, settings, max_model_len=TOKENS + 64)["answers"][0]["tokens"]
        return sum(k in tokenizer.decode(t) for k, t in zip(KEYS, tokens, strict=True))

    return ask


def test_a_passkey_outside_the_window_is_found_by_the_query_and_not_by_recency(found):
    assert found({**SMALL, "scorer": "quest"}) == len(KEYS)
    assert found({**SMALL, "scorer": "recency"}) == 0
