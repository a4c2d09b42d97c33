"""Frequent words: the three most frequent of a coded text whose counts follow a zeta law.

After RULER (arXiv 2404.06654): words without meaning, frequencies proportional to 1 / rank ** 2,
the first rank is noise (dots) that does not count. Counts are the law's expectation instead of
draws, so that the three answers are the most frequent ones by construction.
"""

from __future__ import annotations

from itertools import repeat

from vllm_sparsek.evaluation.tasks.sample import Sample, Setting, hide

EXPONENT = 2.0
NOISE = "...."
ASKED = 3
_VOCABULARY = 60
_MAX_TOKENS = 40
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

WORDINGS = {
    "test": {
        "intro": "Read the following coded text and track the frequency of each coded word. Find "
        "the three most frequently appeared coded words.",
        "question": "Do not provide any explanation. Please ignore the dots. What are the three "
        "most frequently appeared words in the coded text above?",
        "prefix": "According to the coded text above, the three most frequently appeared words "
        "are:",
    },
    "tune": {
        "intro": "Below is the log of a machine that prints one signal at a time. Count how often "
        "each signal occurs.",
        "question": "Dots are pauses and no signals. Which three signals did the machine print "
        "most often?",
        "prefix": "The machine's three most frequent signals are:",
    },
}


def frequent_words(setting: Setting) -> Sample:
    """The counts fall as 1, 1/4, 1/9, ...: the answer is ranks two to four."""
    rng, wording, encode = setting.rng, WORDINGS[setting.split], setting.encoder.ids
    words: list[str] = []
    while len(words) < _VOCABULARY:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
        if word not in words:
            words.append(word)
    ranked = [encode(f" {word}") for word in (NOISE, *words)]
    before, after = setting.encoder.frame()
    head = before + encode(f"{wording['intro']}\n\n")
    room = setting.length - len(head)
    weights = [(rank + 1) ** -EXPONENT for rank in range(len(ranked))]
    tokens = sum(weight * len(ids) for weight, ids in zip(weights, ranked, strict=True))
    coded = [
        ids
        for weight, ids in zip(weights, ranked, strict=True)
        for _ in range(int(weight * room / tokens))
    ]
    # rounding down left room: more noise
    left = room - sum(map(len, coded))
    coded += [ranked[0]] * (left // len(ranked[0]))
    rng.shuffle(coded)
    text = [token for ids in coded for token in ids]
    context, _ = hide(head + text, [], repeat(ranked[0]), setting.length)
    return Sample(
        context=context,
        question=encode(f"\n\n{wording['question']}") + after + encode(wording["prefix"]),
        references=tuple(words[:ASKED]),
        max_tokens=_MAX_TOKENS,
    )
