"""Needles in a haystack: single, multi-key, multi-value, multi-query.

After RULER (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language
Models?", arXiv 2404.06654): keys are pairs of words, values are numbers of seven digits, a needle
states one value of one key. Distractors look like the needle and have other keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from vllm_sparsek.evaluation.tasks.sample import Filler, Sample, Setting

# none of these words is among those that fitting hides
ADJECTIVES = """
    brisk calm dusty eager faint mellow icy jolly keen lively humble olive polite rapid silent
    tidy upper vivid wary young zesty bold crisp dim early fresh glossy proud sturdy witty
""".split()  # noqa: SIM905 - words are easier to read than a list of strings
NOUNS = """
    candle desert engine feather hammer island jacket meadow needle pencil quarry ribbon tunnel
    umbrella valley yard zipper castle dragon forest blanket cactus dolphin falcon glacier hinge
    igloo mitten pillow rocket
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Wording:
    """Templates of one split."""

    intro: str
    needle: str
    question: str
    prefix: str


WORDINGS = {
    "test": Wording(
        intro="Some special magic numbers are hidden within the following text. Make sure to "
        "memorize them. I will quiz you about the numbers afterwards.",
        needle="One of the special magic numbers for {key} is: {value}.",
        question="What {are} for {keys} mentioned in the text above?",
        prefix="The special magic {number} for {keys} mentioned in the text above {verb}",
    ),
    "tune": Wording(
        intro="A clerk left access codes in the pages below. Note each of them while you read.",
        needle="Note to the files: whoever asks for {key} gets code {value}.",
        question="According to the clerk's notes, what {are} for {keys}?",
        prefix="According to the notes, the {number} for {keys} {verb}",
    ),
}
# {number} and {are}, for one and for many
_NUMBER = {"test": ("number", "numbers"), "tune": ("code", "codes")}
_ARE = {
    "test": ("is the special magic number", "are all the special magic numbers"),
    "tune": ("is the code", "are all the codes"),
}
_TOKENS_PER_VALUE = 14


def draw_keys(rng: Random, count: int) -> list[str]:
    """Distinct keys of two words."""
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[p // len(NOUNS)]}-{NOUNS[p % len(NOUNS)]}" for p in pairs]


def draw_values(rng: Random, count: int) -> list[str]:
    """Distinct numbers of seven digits."""
    return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), count)]


def make(setting: Setting, filler: Filler, keys: int, values: int, asked: int) -> Sample:
    """A sample with ``keys`` keys of ``values`` values each; the first ``asked`` are asked for."""
    wording, rng = WORDINGS[setting.split], setting.rng
    names = draw_keys(rng, keys)
    numbers = draw_values(rng, keys * values)
    pieces = [
        wording.needle.format(key=names[index // values], value=number)
        for index, number in enumerate(numbers)
    ]
    wanted = asked * values
    many = wanted > 1
    listed = names[0] if asked == 1 else f"{', '.join(names[: asked - 1])} and {names[asked - 1]}"
    words = {
        "keys": listed,
        "are": _ARE[setting.split][many],
        "number": _NUMBER[setting.split][many],
        "verb": "are" if many else "is",
    }
    return setting.prompt(
        intro=wording.intro,
        pieces=pieces,
        filler=filler,
        question=wording.question.format(**words),
        answer_prefix=wording.prefix.format(**words),
        references=numbers[:wanted],
        max_tokens=_TOKENS_PER_VALUE * (wanted + 1),
        needles=range(wanted),
    )


def single_noise(setting: Setting) -> Sample:
    """One needle in repeated noise."""
    return make(setting, setting.noise, keys=1, values=1, asked=1)


def single_essay(setting: Setting) -> Sample:
    """One needle in real text."""
    return make(setting, setting.essay, keys=1, values=1, asked=1)


def multi_key(setting: Setting) -> Sample:
    """One needle in real text among three distractors with other keys."""
    return make(setting, setting.essay, keys=4, values=1, asked=1)


def multi_value(setting: Setting) -> Sample:
    """Four values of one key in real text, all of them asked for."""
    return make(setting, setting.essay, keys=1, values=4, asked=1)


def multi_query(setting: Setting) -> Sample:
    """Four keys in real text, two of them asked for."""
    return make(setting, setting.essay, keys=4, values=1, asked=2)
