"""Passkey: one number, stated once in plain prose without a key, asked for at the end.

After Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300), over essays instead of noise.
"""

from __future__ import annotations

from vllm_sparsek.evaluation.tasks.sample import Sample, Setting

_MAX_TOKENS = 16

WORDINGS = {
    "test": {
        "intro": "Somewhere in the pages that follow a pass key is given. Find it and remember it.",
        "needle": "The pass key is {value}. Keep it in mind: {value} is the pass key.",
        "question": "What is the pass key?",
        "prefix": "The pass key is",
    },
    "tune": {
        "intro": "Read these pages. Somebody mentions the combination of a safe in them.",
        "needle": "The safe opens, he whispered, if you dial {value}; yes, {value}.",
        "question": "Which combination opens the safe?",
        "prefix": "The safe opens with",
    },
}


def passkey(setting: Setting) -> Sample:
    """A number of five digits in real text."""
    wording = WORDINGS[setting.split]
    value = str(setting.rng.randrange(10_000, 100_000))
    return setting.prompt(
        intro=wording["intro"],
        pieces=[wording["needle"].format(value=value)],
        filler=setting.essay,
        question=wording["question"],
        answer_prefix=wording["prefix"],
        references=[value],
        max_tokens=_MAX_TOKENS,
    )
